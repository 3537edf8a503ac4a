"""Measures the cost of the training loop beyond the model: overhead, optimizer, data, checkpoints, two processes.

    python recipes/benchmarks/training_speed.py --tokenizer runs/tokenizer \\
        --train_files 'text/*.parquet' --val_files val.parquet

    python recipes/benchmarks/training_speed.py ... --depth 6 --aspect_ratio 64 --total_batch_size 16384 --processes 2

Notable features:
- runs `recipes/pretrain.py` as a user would and reads its log, alternating with the bare step (forward and backward of
  the same model on one fixed batch); reports medians over `repeats`
- with `--processes 2`, also compares one run on two processes with two concurrent runs, one thread each
- the table states machine and shapes; the last line is JSON with all results
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from evals.speed.timing import take_turns
from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "recipes" / "pretrain.py"


@dataclass
class TrainingSpeedArguments:
    """Shapes and repeats."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Raw text."})
    val_files: list[str] = field(metadata={"help": "Raw text for validation."})
    architecture: Literal["plain", "turbo"] = field(default="plain", metadata={"help": "Model architecture."})
    depth: int = field(default=4, metadata={"help": "Number of layers."})
    aspect_ratio: int = field(default=32, metadata={"help": "Width per layer."})
    head_dim: int = field(default=32, metadata={"help": "Dimension of an attention head."})
    max_length: int = field(default=256, metadata={"help": "Tokens per row."})
    total_batch_size: int = field(default=4096, metadata={"help": "Tokens per step."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per forward pass."})
    steps: int = field(default=40, metadata={"help": "Steps per run; the first quarter is warm-up."})
    repeats: int = field(default=3, metadata={"help": "Alternating runs of each kind."})
    processes: int = field(default=1, metadata={"help": "2: compare two processes with two concurrent runs."})
    bare: bool = field(default=False, metadata={"help": "Only print the seconds of the bare step (internal)."})


def main() -> None:
    (args,) = parse(TrainingSpeedArguments)
    if args.bare:
        print(json.dumps(bare_seconds(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {"loop": measure_loop(args, Path(folder))}
        if args.processes > 1:
            results["processes"] = measure_processes(args, Path(folder))
    print_tables(args, results)


def bare_seconds(args: TrainingSpeedArguments) -> list[float]:
    """Seconds of each step's forward and backward passes on one fixed batch, without two warm-up steps."""
    from transformers import AutoTokenizer

    config_class, model_class = ARCHITECTURES[args.architecture]
    config = config_class.from_depth(
        args.depth,
        aspect_ratio=args.aspect_ratio,
        head_dim=args.head_dim,
        vocab_size=len(AutoTokenizer.from_pretrained(args.tokenizer)),
        max_position_embeddings=args.max_length,
    )
    torch.manual_seed(0)
    model = model_class(config).train()
    ids = torch.randint(0, config.vocab_size, (args.per_device_train_batch_size, args.max_length + 1))
    passes = args.total_batch_size // (args.per_device_train_batch_size * args.max_length)

    def step() -> None:
        for _ in range(passes):
            model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return take_turns({"bare": step}, "cpu", args.steps // 2)[1]["bare"]


def measure_loop(args: TrainingSpeedArguments, folder: Path) -> dict[str, float]:
    """Medians over alternating runs: seconds per step by component, and of the bare step."""
    bare, runs = [], []
    for repeat in range(args.repeats):
        bare.append(statistics.median(run_bare(args)))
        output = folder / f"loop{repeat}" / "base"
        wait([start_training(args, output)])
        runs.append(read_log(output, args.steps))
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    medians["bare"] = statistics.median(bare)
    # The optimizer counts as part of the bare step, because training needs it; its time comes from the loop's log.
    ideal = [seconds + run["optimizer"] for seconds, run in zip(bare, runs, strict=True)]
    ratios = (seconds / run["training"] for seconds, run in zip(ideal, runs, strict=True))
    medians["loop_over_bare"] = statistics.median(ratios)
    return medians


def measure_processes(args: TrainingSpeedArguments, folder: Path) -> dict[str, float]:
    """Tokens/s of one run on `processes` processes, and of as many concurrent runs, one thread each."""
    together, alone = [], []
    for repeat in range(args.repeats):
        output = folder / f"together{repeat}" / "base"
        wait([start_training(args, output, processes=args.processes)])
        together.append(args.total_batch_size / read_log(output, args.steps)["training"])
        outputs = [folder / f"alone{repeat}-{n}" / "base" for n in range(args.processes)]
        wait([start_training(args, output, threads=1) for output in outputs])
        alone.append(sum(args.total_batch_size / read_log(output, args.steps)["training"] for output in outputs))
    ratios = [a / b for a, b in zip(together, alone, strict=True)]
    return {
        "together_tokens_per_second": statistics.median(together),
        "alone_tokens_per_second": statistics.median(alone),
        "ratio": statistics.median(ratios),
    }


def run_bare(args: TrainingSpeedArguments) -> list[float]:
    command = [sys.executable, __file__, *words(asdict(args) | {"bare": "true"})]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise UserError(f"the bare step failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def start_training(
    args: TrainingSpeedArguments, output_dir: Path, processes: int = 1, threads: int | None = None
) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        threads = 1
    rows = max(1, args.per_device_train_batch_size // processes)  # the batch per step stays the same
    not_pretraining = ("steps", "repeats", "processes", "bare")
    settings = {key: value for key, value in asdict(args).items() if key not in not_pretraining}
    settings |= {
        "per_device_train_batch_size": rows,
        "output_dir": output_dir,
        "max_steps": args.steps,
        "logging_steps": 1,
        "eval_steps": 0,
        "eval_tokens": args.max_length,
        "sample_steps": 0,
        "save_steps": args.steps // 2,
        "torch_compile": "false",
    }
    command = [*launcher, str(PRETRAIN), *words(settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes, env=environment(threads))


def words(settings: dict[str, object]) -> list[str]:
    """Command-line arguments for settings."""
    line = []
    for key, value in settings.items():
        line += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return line


def environment(threads: int | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def wait(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        output = process.communicate()[0]
        if process.returncode:
            lines = output.strip().splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            raise UserError(f"training failed: {errors[0] if errors else lines[-1:]}")


def read_log(output_dir: Path, steps: int) -> dict[str, float]:
    """Median seconds per step by component after the warm-up; `checkpoint` is the median seconds per save."""
    lines = (output_dir.parent / "logs" / f"{output_dir.name}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row and row["step"] > steps // 4]
    kinds = ("training", "data", "model", "optimizer", "rest")
    found = {kind: statistics.median(row.get(f"seconds_{kind}", 0.0) for row in rows) for kind in kinds}
    found["data_share"] = sum(row["seconds_data"] for row in rows) / sum(row["seconds_training"] for row in rows)
    saves = [row["seconds_checkpoint"] for row in rows if row.get("seconds_checkpoint", 0) > 1e-4]
    return found | {"checkpoint": statistics.median(saves) if saves else 0.0}


def print_tables(args: TrainingSpeedArguments, results: dict[str, dict[str, float]]) -> None:
    loop = results["loop"]
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, uncompiled")
    print(
        f"{args.architecture} d{args.depth}, width per layer {args.aspect_ratio}, "
        f"{args.total_batch_size} tokens per step in passes of "
        f"{args.per_device_train_batch_size} x {args.max_length}; medians of {args.repeats} runs\n"
    )
    rows = [
        ["", "measured"],
        ["tokens/s of the loop", f"{args.total_batch_size / loop['training']:,.0f}"],
        ["loop over bare step (forward, backward, optimizer)", f"{loop['loop_over_bare']:.3f}"],
        ["optimizer, share of the step", f"{loop['optimizer'] / loop['training']:.1%}"],
        ["waiting for data, share of all steps", f"{loop['data_share']:.2%}"],
        ["one checkpoint, share of 100 steps", f"{loop['checkpoint'] / (100 * loop['training']):.2%}"],
    ]
    if "processes" in results:
        ratio = results["processes"]["ratio"]
        rows.append([f"{args.processes} processes over {args.processes} concurrent runs", f"{ratio:.3f}"])
    print(markdown_table(rows))
    print(json.dumps({"settings": asdict(args), **results}))


if __name__ == "__main__":
    exit_on_user_error(main)
