"""The outputs of every stage: a finished model folder, a training log, and a record of its settings and machine.

A folder under its final name is complete: it is written under a temporary name, flushed to disk and renamed.
"""

import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_nanochat.checks.versions import warn_of_untested_versions
from modeling_nanochat.errors import UserError, one_line
from modeling_nanochat.folders import atomic_directory, flush, settle
from modeling_nanochat.hub import hub_failure
from modeling_nanochat.tokenization_nanochat import has_control_tokens, save_tokenizer, set_special_tokens

from .checkpoint.files import write_text
from .checkpoint.folders import checkpoint_folders, discard
from .device import let_segments_grow
from .processes import lock_output, on_main_process

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "trl", "huggingface_hub")
PROBE_BYTES = 2**16


@dataclass
class OutputArguments:
    """Where a stage's model goes. The same options in every stage."""

    output_dir: str = field(metadata={"help": "Model folder to write; its log and record go beside it."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an existing model."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished folder to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Hub repository, such as me/my-nanochat."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Create the Hub repository as private."})


def check_output(args: OutputArguments, resume: str | None = None, given: dict[str, Any] | None = None) -> bool:
    """Check before any work that the output can be saved, overwrites nothing, and does not exist. In every process.

    Locks the output folder until the main process exits, and cleans up after a run that was killed while finishing.

    Args:
        given: The settings that define the run, as stored in its record under "given".

    Returns:
        Whether the same run has already finished. Then there is nothing to do; a requested upload has been done.

    Raises:
        UserError: The folder is not writable, is in use by another trainer, or holds a finished or unfinished model;
            or the repository to push to is missing.
    """
    let_segments_grow()
    if args.push_to_hub and not args.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id, for instance me/my-nanochat")
    finished = on_main_process(lambda: take_output(args, resume, given))
    if finished and PartialState().is_main_process:
        push(args)
        discard_own_checkpoints(args.output_dir)
    return finished


def take_output(args: OutputArguments, resume: str | None, given: dict[str, Any] | None) -> bool:
    """The main process's part of [`check_output`]."""
    warn_of_untested_versions()
    folder, checkpoints = Path(args.output_dir), beside(args.output_dir, "checkpoints", "")
    if folder.name in ("", "..") or (os.path.lexists(folder) and not folder.is_dir()):
        raise UserError(f"--output_dir {args.output_dir} is not a folder name; give one such as runs/pocket/base")
    try:
        probe(folder)
        lock_output(folder)
        settle_record(folder, settle(folder))
    except OSError as error:
        raise UserError(
            f"--output_dir {args.output_dir}: {error.filename or folder.parent} cannot be written ({error.strerror}); "
            "free space, change the permissions, or give another folder"
        ) from error
    if folder.exists() and not args.overwrite_output_dir:
        if given is None or read_record(folder).get("given") != json.loads(json.dumps(given)):
            raise UserError(
                f"{args.output_dir} already exists; pass --overwrite_output_dir true to replace it, "
                "or another --output_dir"
            )
        print(f"{args.output_dir}: already finished with these settings; --overwrite_output_dir true trains it again")
        return True
    if checkpoints.exists() and not resume and not args.overwrite_output_dir:
        raise UserError(
            f"{checkpoints} holds the checkpoints of an unfinished run; pass --resume auto to resume from "
            "them, or --overwrite_output_dir true to start over"
        )
    return False


def discard_own_checkpoints(output_dir: str) -> None:
    """Delete the finished run's checkpoints, unless it keeps one, but not those of a later run to replace it."""
    checkpoints, record = beside(output_dir, "checkpoints", ""), read_record(Path(output_dir))
    keeps = record.get("settings", {}).get("keep_checkpoint")
    if record.get("steps") in checkpoint_folders(checkpoints) and not keeps:
        discard(checkpoints)


def probe(output_dir: Path) -> None:
    """Write a small file wherever the stage will write; creates only the parent of `output_dir`.

    Raises:
        OSError: A folder is not writable, or the disk is full.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("logs", "stages", "checkpoints"):
        folder = beside(output_dir, kind, "").parent
        folder = folder if folder.exists() else output_dir.parent
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error


def record_path(output_dir: str | Path) -> Path:
    return beside(output_dir, "stages", ".json")


def pending_record(output_dir: str | Path) -> Path:
    """The record's path until its model folder is renamed."""
    path = record_path(output_dir)
    return path.with_name(f".{path.name}.unfinished")


def settle_record(output_dir: Path, model_is_whole: bool) -> None:
    """Clean up after a process killed while finishing: keep the record if its model is complete, else delete it."""
    pending = pending_record(output_dir)
    if model_is_whole and pending.exists():
        pending.replace(record_path(output_dir))
    pending.unlink(missing_ok=True)
    discard(beside(output_dir, "checkpoints", ""), only_leftovers=True)


def read_record(output_dir: Path) -> dict[str, Any]:
    """The record of the model at `output_dir`; empty if it is missing or unreadable."""
    try:
        record = json.loads(record_path(output_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class JsonlLogger:
    """Logs the measurements of a stage as JSON lines to `<run>/logs/<stage>.jsonl`, with the seconds since the start.

    Resumed after `step`, at `seconds`, it keeps the lines up to that step and drops those of the lost steps.
    """

    def __init__(self, output_dir: str | Path, enabled: bool = True, *, step: int = 0, seconds: float = 0.0):
        self.started = time.perf_counter() - seconds
        self.path = beside(output_dir, "logs", ".jsonl")
        self.enabled, self.complete = enabled, True
        if enabled:
            with self.tolerating_write_errors():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                kept = lines_up_to(self.path, step) if step else []
                unfinished = self.path.with_name(f".{self.path.name}.unfinished")
                unfinished.write_text("".join(kept), encoding="utf-8")
                unfinished.replace(self.path)  # atomic: a kill loses no line

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def log(self, **values: Any) -> None:
        if self.enabled:
            with self.tolerating_write_errors():
                size = self.path.stat().st_size if self.path.exists() else 0
                try:
                    with open(self.path, "a", encoding="utf-8") as lines:
                        lines.write(json.dumps({"seconds": round(self.seconds, 3), **values}) + "\n")
                except OSError:
                    with suppress(OSError):
                        os.truncate(self.path, size)  # no partial line, which the next one would be appended to
                    raise

    @contextmanager
    def tolerating_write_errors(self) -> Iterator[None]:
        """Warn once if the log cannot be written, and skip the line: it is no reason to lose the training."""
        try:
            yield
        except OSError as error:
            if self.complete:
                tqdm.write(
                    f"warning: {self.path} cannot be written ({error.strerror}); "
                    "training goes on, its log will have gaps",
                    file=sys.stderr,
                )
            self.complete = False


def lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of a log whose step is at most `step`, without a line that a kill truncated."""
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
    log: JsonlLogger,
    record: dict[str, Any],
    card: Callable[[dict], str],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save the model folder atomically, then the stage's record beside it. Main process only.

    `record` needs "stage" and "settings"; time, machine and versions are added. `weights` replace the model's own if
    these are sharded over processes.

    Raises:
        UserError: The folder cannot be written, for example because the disk is full.
    """
    if has_control_tokens(tokenizer):  # a model of other origin keeps its own
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
    pending = pending_record(args.output_dir)
    try:
        pending.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(args.output_dir) as folder:
            model.save_pretrained(folder, state_dict=weights)
            save_tokenizer(tokenizer, folder)
            (folder / "README.md").write_text(card(record), encoding="utf-8")
            write_text(pending, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        pending.replace(record_path(args.output_dir))
        flush(pending.parent)
    except (OSError, SafetensorError) as error:
        pending.unlink(missing_ok=True)
        raise UserError(
            f"{args.output_dir} could not be written ({' '.join(str(error).split())}); "
            "free space and run the stage again"
        ) from error
    print(f"{args.output_dir} written after {log.seconds:.0f} s")


def push(args: OutputArguments) -> None:
    """Upload the finished folder if requested. Main process only, after the others have exited: uploads can take long.

    Raises:
        UserError: The Hub refused or could not be reached; the local folder is kept.
    """
    from huggingface_hub import HfApi

    if not (args.push_to_hub and args.hub_model_id):
        return
    try:
        api = HfApi()
        api.create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True)
        commit = api.upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir)
    except Exception as error:  # the model is safe on disk
        raise UserError(
            f"push to {args.hub_model_id} failed: {hub_failure(error) or one_line(error)}; the model is complete in "
            f"{args.output_dir}, and `hf upload {args.hub_model_id} {args.output_dir}` pushes it"
        ) from error
    print(f"pushed to {commit.repo_url if hasattr(commit, 'repo_url') else args.hub_model_id}")


def settings(*arguments: Any) -> dict[str, Any]:
    """The fields of the dataclasses as plain values."""
    merged: dict[str, Any] = {}
    for group in arguments:
        merged |= asdict(group)
    return merged


def machine() -> dict[str, Any]:
    """The machine that the stage ran on; memory in MiB."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit,
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if gpus else 0,
    }
