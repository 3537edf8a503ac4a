"""Compares the learning curves of several variants: bits per byte against tokens and against seconds.

    python recipes/benchmarks/learning_curves.py --output_dir runs/curves --tokenizer runs/tokenizer \\
        --train_files 'text/*.parquet' --val_files val.parquet

Notable features:
- runs `recipes/pretrain.py` once per variant, sequentially, on the same rows in the same order
- counts training time only, without validation and checkpoints
- writes `table.md`, `curves.svg` and each variant's log
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from evals.reporting.curves import BLUE, ORANGE, STYLE
from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import atomic_write
from recipes.ladder.commands import RECIPES
from recipes.ladder.execution import search_path

GREEN = "#009E73"
# Each recipe's rates for 524,288 tokens per step, set explicitly so that neither is scaled to the batch size.
CLASSIC = {"training_recipe": "classic", "matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004}
CURRENT = {"training_recipe": "current", "matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008}
CURRENT |= {"scalar_lr": 0.5}
VARIANTS = {
    "plain + classic": ({"architecture": "plain"} | CLASSIC, BLUE),
    "plain + current": ({"architecture": "plain"} | CURRENT, ORANGE),
    "turbo + current": ({"architecture": "turbo"} | CURRENT, GREEN),
}


@dataclass
class LearningCurvesArguments:
    """Settings shared by all variants."""

    output_dir: str = field(metadata={"help": "Folder for the runs, the table and the plot."})
    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Raw text."})
    val_files: list[str] = field(metadata={"help": "Held-out raw text."})
    depth: int = field(default=4, metadata={"help": "Number of layers."})
    aspect_ratio: int = field(default=32, metadata={"help": "Width per layer."})
    head_dim: int = field(default=32, metadata={"help": "Dimension of an attention head."})
    max_length: int = field(default=256, metadata={"help": "Tokens per row."})
    total_batch_size: int = field(default=8192, metadata={"help": "Tokens per step."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per forward pass."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    warmup_steps: int = field(default=10, metadata={"help": "Learning rate warm-up steps."})
    eval_steps: int = field(default=25, metadata={"help": "Steps between validations."})
    eval_tokens: int = field(default=131072, metadata={"help": "Tokens per validation."})


@dataclass(frozen=True)
class Curve:
    """One variant's curve: tokens, training seconds and bits per byte at each validation."""

    name: str
    tokens: list[int]
    seconds: list[float]
    bits_per_byte: list[float]


def main() -> None:
    (args,) = parse(LearningCurvesArguments)
    folder = Path(args.output_dir)
    curves = []
    for name, (settings, _) in VARIANTS.items():
        run = folder / name.replace(" + ", "-") / "base"
        train(args, settings, run)
        curves.append(read_curve(name, run))
    draw(curves, folder / "curves.svg")
    text = table(curves, args)
    atomic_write(folder / "table.md", text)
    print(text)


def train(args: LearningCurvesArguments, settings: dict[str, object], run: Path) -> None:
    """Train a variant, or resume it; does nothing if finished with these settings, and fails if with others."""
    common = {key: value for key, value in vars(args).items() if key != "output_dir"}
    fixed = {"output_dir": run, "sample_steps": 0, "torch_compile": "false", "resume": "auto"}
    command = [sys.executable, str(RECIPES / "pretrain.py"), *words(common | settings | fixed)]
    if subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": search_path()}).returncode:
        raise UserError(f"{run} failed; fix the error above, then the same command continues")


def words(settings: dict[str, object]) -> list[str]:
    """Command-line arguments for settings."""
    line = []
    for key, value in settings.items():
        line += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return line


def read_curve(name: str, run: Path) -> Curve:
    lines = (run.parent / "logs" / f"{run.name}.jsonl").read_text(encoding="utf-8").splitlines()
    seconds, logged_at, curve = 0.0, 0, Curve(name, [], [], [])
    for row in map(json.loads, lines):
        if "seconds_training" in row:  # mean per step since the previous entry
            seconds += row["seconds_training"] * (row["step"] - logged_at)
            logged_at = row["step"]
        if "bits_per_byte" in row:
            curve.tokens.append(row["tokens"])
            curve.seconds.append(seconds)
            curve.bits_per_byte.append(row["bits_per_byte"])
    return curve


def cost_of(curve: Curve, bits_per_byte: float, costs: list[float]) -> float | None:
    """Cost of reaching `bits_per_byte`, interpolated between validations; None if not reached."""
    points = list(zip(curve.bits_per_byte, costs, strict=True))
    for (before, cost_before), (after, cost_after) in pairwise(points):
        if after <= bits_per_byte < before:
            return cost_before + (before - bits_per_byte) / (before - after) * (cost_after - cost_before)
    return None


def table(curves: list[Curve], args: LearningCurvesArguments) -> str:
    """Final figures of each curve, and its cost of reaching the first curve's final value."""
    first = curves[0]
    goal = first.bits_per_byte[-1]
    title = (
        f"d{args.depth}, {args.depth * args.aspect_ratio} wide, "
        f"{args.max_steps} steps of {args.total_batch_size:,} tokens; {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, float32, uncompiled"
    )
    ends = [["", "bits per byte at the end", "seconds", "tokens/s", f"tokens to {goal:.4f}", f"seconds to {goal:.4f}"]]
    for curve in curves:
        costs = [cost_of(curve, goal, costs) for costs in (curve.tokens, curve.seconds)]
        reached = [f"{cost:,.0f}" if cost is not None else "not reached" for cost in costs]
        speed = f"{curve.tokens[-1] / curve.seconds[-1]:,.0f}"
        ends.append([curve.name, f"{curve.bits_per_byte[-1]:.4f}", f"{curve.seconds[-1]:,.0f}", speed, *reached])
    steps = [["tokens", *(curve.name for curve in curves)]]
    steps += [
        [f"{tokens:,}", *(f"{curve.bits_per_byte[number]:.4f}" for curve in curves)]
        for number, tokens in enumerate(first.tokens)
    ]
    return f"{title}\n\n{markdown_table(ends)}\n\n{markdown_table(steps)}\n"


def draw(curves: list[Curve], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.4))
        by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
        for curve in curves:
            color = VARIANTS[curve.name][1]
            millions = [tokens / 1e6 for tokens in curve.tokens]
            by_tokens.plot(millions, curve.bits_per_byte, color=color, label=curve.name)
            by_seconds.plot(curve.seconds, curve.bits_per_byte, color=color, label=curve.name)
        by_tokens.set_xlabel("million tokens")
        by_seconds.set_xlabel("seconds of training")
        by_tokens.set_ylabel("bits per byte, held-out text")
        # Scale without the first two validations, which would flatten the differences.
        visible = [value for curve in curves for value in curve.bits_per_byte[2:]] or [1.0]
        by_tokens.set_ylim(0.97 * min(visible), 1.03 * max(visible))
        by_tokens.legend(frameon=False)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    exit_on_user_error(main)
