"""Compares compiled training steps with the original's on a CPU, in one process, with and without optimizer.

    python recipes/benchmarks/beside_original.py --original DIR --version classic
    python recipes/benchmarks/beside_original.py --original DIR --version current --depth 6 --rows 2

DIR is a checkout of that version of the original nanochat, or a folder with checkouts named `classic` (the launch
version, compared with plain) and `current` (compared with turbo). Both sides use the same shapes, full attention and
float32, and alternate; figures are medians. "pass" is forward and backward only. The launch version's Muon uses
bfloat16, which most CPUs emulate, so its "step" says nothing about a GPU; compare passes instead. The last line is
JSON. Takes a few minutes on two cores; `gpu_check.py` makes the same comparison on a GPU.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from evals.speed.timing import take_turns
from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.benchmarks.gpu_checks import Setting, Skipped
from recipes.benchmarks.gpu_checks.original import OriginalRun, find_checkout, parts
from recipes.benchmarks.gpu_checks.runs import make_run

COUNTERPARTS = {"classic": "plain", "current": "turbo"}
WHAT = ("pass", "step")


@dataclass
class BesideOriginalArguments:
    """Versions and shapes."""

    original: str = field(metadata={"help": "Folder with the original nanochat."})
    version: Literal["classic", "current"] = field(metadata={"help": "classic (against plain) or current (turbo)."})
    depth: int = field(default=4, metadata={"help": "Number of layers; the width is 64 per layer."})
    vocab_size: int = field(default=32768, metadata={"help": "Vocabulary size."})
    rows: int = field(default=4, metadata={"help": "Rows per step."})
    length: int = field(default=1024, metadata={"help": "Tokens per row."})
    turns: int = field(default=7, metadata={"help": "Timed steps per implementation."})


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
    """Seconds of each timed pass and step of both implementations."""
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
    runs = {"ours": ours, "original": original}
    calls = {f"{name} {what}": call for name, run in runs.items() for what, call in parts(run).items()}
    return take_turns(calls, setting.device, args.turns)[1]


if __name__ == "__main__":
    exit_on_user_error(main)
