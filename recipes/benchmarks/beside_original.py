"""A compiled training step on a CPU beside the original's own compiled step, in one process, with and without optimizer.

    python recipes/benchmarks/beside_original.py --original DIR --version classic
    python recipes/benchmarks/beside_original.py --original DIR --version current --depth 6 --rows 2

DIR is a checkout of that version of the original nanochat, or a folder with checkouts called `classic` (the launch
version, beside plain) and `current` (beside turbo). Same shapes, full attention in all layers, float32; both take turns,
and a figure is the median. "pass" is forward and backward alone. Muon of the launch version works in bfloat16, which most
CPUs emulate: its "step" then says nothing about a GPU, and the pass is the fair figure. The last line is JSON. Some
minutes on two cores; `gpu_check.py` compares the same on a GPU.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.benchmarks.gpu_checks import Setting, Skipped
from recipes.benchmarks.gpu_checks.measuring import seconds_of
from recipes.benchmarks.gpu_checks.original import OriginalRun, find_checkout
from recipes.benchmarks.gpu_checks.runs import TrainingRun, make_run

COUNTERPARTS = {"classic": "plain", "current": "turbo"}
WARM_UP = 2  # the first step compiles
WHAT = ("pass", "step")


@dataclass
class BesideOriginalArguments:
    """Versions and shapes."""

    original: str = field(metadata={"help": "Folder of the original."})
    version: Literal["classic", "current"] = field(metadata={"help": "classic beside plain, or current beside turbo."})
    depth: int = field(default=4, metadata={"help": "Layers; 64 channels for each."})
    vocab_size: int = field(default=32768, metadata={"help": "Tokens in the vocabulary."})
    rows: int = field(default=4, metadata={"help": "Rows in a step."})
    length: int = field(default=1024, metadata={"help": "Tokens in a row."})
    turns: int = field(default=7, metadata={"help": "Timed steps of each side."})


def main() -> None:
    (args,) = parse(BesideOriginalArguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args, Setting("cpu", folder, args.original, window_pattern="L"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, times in seconds.items():
        print(f"{name}: {1e3 * medians[name]:,.0f} ms ({1e3 * min(times):,.0f} to {1e3 * max(times):,.0f})")
    ratios = {what: medians[f"original {what}"] / medians[f"ours {what}"] for what in WHAT}
    for what, ratio in ratios.items():
        print(f"{what}: our speed / the original's: {ratio:.3f}")
    print(json.dumps({"settings": asdict(args), "seconds": seconds, "ratios": ratios}))


def measure(args: BesideOriginalArguments, setting: Setting) -> dict[str, list[float]]:
    """Seconds of each step of both sides."""
    try:
        sys.path.insert(0, str(find_checkout(setting, args.version)))
    except Skipped as error:
        raise UserError(f"original: {error}") from error
    architecture = COUNTERPARTS[args.version]
    sizes = {"vocab_size": args.vocab_size, "max_position_embeddings": args.length}
    sizes |= {"window_pattern": setting.window_pattern} if architecture == "turbo" else {}
    config = ARCHITECTURES[architecture][0].from_depth(args.depth, **sizes)
    ours = make_run(setting, config, args.rows, args.length, compiled=True)
    original = OriginalRun(setting, config, ours.batch)
    original.module = torch.compile(original.model, dynamic=False)
    calls = {f"{name} {what}": call for name, run in (("ours", ours), ("original", original)) for what, call in run_parts(run)}
    seconds = {name: [] for name in calls}
    for turn in range(WARM_UP + args.turns):
        for name, call in calls.items():
            taken = seconds_of(call, setting.device)
            seconds[name] += [taken] if turn >= WARM_UP else []
    return seconds


def run_parts(run: TrainingRun | OriginalRun) -> list[tuple[str, Callable[[], object]]]:
    return list(zip(WHAT, (run.pass_alone, run.step), strict=True))


if __name__ == "__main__":
    exit_on_user_error(main)
