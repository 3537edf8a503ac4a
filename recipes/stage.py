"""What every stage leaves behind: a finished model folder, a log of its training, and a record of its settings and machine.

A folder under its final name is whole: it is written beside it, flushed to disk and renamed.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.records import write_json
from modeling_nanochat.errors import UserError
from modeling_nanochat.folders import whole_folder
from modeling_nanochat.tokenization_nanochat import save_tokenizer, set_special_tokens

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "trl", "huggingface_hub")


@dataclass
class OutputArguments:
    """Where a stage's model goes. The same words in every stage."""

    output_dir: str = field(metadata={"help": "Model folder to write; its log and record go beside it."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished model there."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished folder to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Hub repository, for instance me/my-nanochat."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new Hub repository private."})


def check_output(args: OutputArguments, resume: str | None = None) -> None:
    """Raise [`UserError`] before any work is done if its result could not be put away, or would bury an unfinished run."""
    if Path(args.output_dir).exists() and not args.overwrite_output_dir:
        raise UserError(
            f"{args.output_dir} already exists; pass --overwrite_output_dir true to replace it, or another --output_dir"
        )
    unfinished = beside(args.output_dir, "checkpoints", "")
    if unfinished.exists() and not resume and not args.overwrite_output_dir:
        raise UserError(
            f"{unfinished} holds the checkpoints of an unfinished run; pass --resume auto to go on from them, or "
            "--overwrite_output_dir true to start anew"
        )
    if args.push_to_hub and not args.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id, for instance me/my-nanochat")


class StageLog:
    """Measurements of one stage as JSON lines in `<run>/logs/<stage>.jsonl`, each with the seconds since the start.

    Going on after `step`, with `seconds` on the clock, it keeps the lines up to that step and drops what the lost steps
    had written after it.
    """

    def __init__(self, output_dir: str | Path, enabled: bool = True, *, step: int = 0, seconds: float = 0.0):
        self.started = time.perf_counter() - seconds
        self.path = beside(output_dir, "logs", ".jsonl")
        self.enabled = enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = lines_up_to(self.path, step) if step else []
            unfinished = self.path.with_name(f".{self.path.name}.unfinished")
            unfinished.write_text("".join(kept), encoding="utf-8")
            unfinished.replace(self.path)  # a kill in between takes no line

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def log(self, **values: Any) -> None:
        if self.enabled:
            with open(self.path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"seconds": round(self.seconds, 3), **values}) + "\n")


def lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of a log whose step is at most `step`; a line that a kill cut short is not one of them."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def beside(output_dir: str | Path, kind: str, suffix: str) -> Path:
    """`runs/pocket/base`, "logs", ".jsonl" -> `runs/pocket/logs/base.jsonl`."""
    output_dir = Path(output_dir)
    return output_dir.parent / kind / (output_dir.name + suffix)


def finish_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    args: OutputArguments,
    log: StageLog,
    record: dict[str, Any],
    card: Callable[[dict], str],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save the model folder whole, then the stage's record beside it. Main process only.

    `record` needs "stage" and "settings"; what the run took and ran on is added. `weights` stand in for the model's own
    where these are spread over processes.

    Raises:
        UserError: The folder cannot be written, for instance because the disk is full.
    """
    set_special_tokens(model, tokenizer)
    model.config.use_cache = True
    record = record | {
        "seconds": round(log.seconds, 1),
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
    try:
        with whole_folder(args.output_dir) as folder:
            model.save_pretrained(folder, state_dict=weights)
            save_tokenizer(tokenizer, folder)
            (folder / "README.md").write_text(card(record), encoding="utf-8")
        write_json(beside(args.output_dir, "stages", ".json"), record)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{args.output_dir} could not be written ({' '.join(str(error).split())}); free space and run the stage again"
        ) from error
    print(f"{record['stage']}: {args.output_dir} written after {log.seconds:.0f} s")


def push(args: OutputArguments) -> None:
    """Upload the finished folder if asked to. Main process only, after the others have gone: uploads can be long.

    Raises:
        UserError: The Hub refused, or could not be reached; the folder itself is kept.
    """
    from huggingface_hub import HfApi

    if not args.push_to_hub:
        return
    try:
        api = HfApi()
        api.create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True)
        commit = api.upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir)
    except Exception as error:  # transport errors differ between hub 1.x and 2.x; the model is safe on disk either way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"push to {args.hub_model_id} failed ({reason}); the model is whole in {args.output_dir}: after "
            f"`hf auth login`, run `hf upload {args.hub_model_id} {args.output_dir}`"
        ) from error
    print(f"pushed to {commit.repo_url if hasattr(commit, 'repo_url') else args.hub_model_id}")


def settings(*arguments: Any) -> dict[str, Any]:
    """The fields of the dataclasses as plain values."""
    merged = {}
    for one in arguments:
        merged |= asdict(one)
    return merged


def machine() -> dict[str, Any]:
    """What the stage ran on; memory in MiB."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit,
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if gpus else 0,
    }
