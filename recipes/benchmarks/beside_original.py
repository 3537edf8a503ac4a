"""Compares training steps or decoding with the original's on a CPU, alternating in one process.

    python recipes/benchmarks/beside_original.py --original DIR --version classic
    python recipes/benchmarks/beside_original.py --original DIR --version current --depth 6 --rows 2
    python recipes/benchmarks/beside_original.py --original DIR --version classic --what decoding --rows 16 --length 64

DIR is a checkout of that version of the original nanochat, or a folder with checkouts named `classic` (the launch
version, compared with plain) and `current` (compared with turbo). Both sides use the same shapes, full attention and
float32; figures are medians. "pass" is forward and backward only. The launch version's Muon uses bfloat16, which most
CPUs emulate, so its "step" says nothing about a GPU; compare passes instead. Decoding is greedy, of several samples of
one prompt, prefill included. The last line is JSON. Takes a few minutes on two cores; `gpu_check.py` compares training
on a GPU.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from evals.speed.candidates import fill_weights
from evals.speed.timing import take_turns
from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.tokenization_nanochat import build_tokenizer, byte_symbols
from recipes.benchmarks.gpu_checks import Setting, Skipped
from recipes.benchmarks.gpu_checks.original import OriginalRun, find_checkout, original_model, parts
from recipes.benchmarks.gpu_checks.runs import make_run

COUNTERPARTS = {"classic": "plain", "current": "turbo"}
OURS, ORIGINAL = "ours ", "original "
Calls = dict[str, Callable[[], Any]]


@dataclass
class BesideOriginalArguments:
    """Versions and shapes."""

    original: str = field(metadata={"help": "Folder with the original nanochat."})
    version: Literal["classic", "current"] = field(metadata={"help": "classic (against plain) or current (turbo)."})
    what: Literal["training", "decoding"] = field(default="training", metadata={"help": "What to compare."})
    depth: int = field(default=4, metadata={"help": "Number of layers; the width is 64 per layer."})
    vocab_size: int = field(default=32768, metadata={"help": "Vocabulary size."})
    rows: int = field(default=4, metadata={"help": "Rows per step, or samples."})
    length: int = field(default=1024, metadata={"help": "Tokens per row, or of the prompt."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens of each sample."})
    torch_compile: bool = field(
        default=True, metadata={"help": "Compile training of both, or our decoding step; the original has only one."}
    )
    turns: int = field(default=7, metadata={"help": "Timed calls per implementation."})


def main() -> None:
    (args,) = parse(BesideOriginalArguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args, Setting("cpu", folder, args.original, window_pattern="L"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, times in seconds.items():
        print(f"{name}: {1e3 * medians[name]:,.0f} ms ({1e3 * min(times):,.0f} to {1e3 * max(times):,.0f})")
    whats = [name.removeprefix(OURS) for name in seconds if name.startswith(OURS)]
    ratios = {what: medians[ORIGINAL + what] / medians[OURS + what] for what in whats}
    for what, ratio in ratios.items():
        print(f"{what}: our speed / the original's: {ratio:.3f}")
    print(json.dumps({"settings": asdict(args), "seconds": seconds, "ratios": ratios}))


def measure(args: BesideOriginalArguments, setting: Setting) -> dict[str, list[float]]:
    """Seconds of each timed call of both implementations."""
    try:
        sys.path.insert(0, str(find_checkout(setting, args.version)))
    except Skipped as error:
        raise UserError(f"original: {error}") from error
    architecture = COUNTERPARTS[args.version]
    context = args.length + (args.new_tokens if args.what == "decoding" else 0)
    sizes = {"vocab_size": args.vocab_size, "max_position_embeddings": context}
    sizes |= {"window_pattern": setting.window_pattern} if architecture == "turbo" else {}
    config = ARCHITECTURES[architecture][0].from_depth(args.depth, **sizes)
    calls = (training if args.what == "training" else decoding)(args, setting, config)
    return take_turns(calls, setting.device, args.turns)[1]


def training(args: BesideOriginalArguments, setting: Setting, config: NanoChatConfig) -> Calls:
    ours = make_run(setting, config, args.rows, args.length, compiled=args.torch_compile)
    original = OriginalRun(setting, config, ours.batch)
    if args.torch_compile:
        original.module = torch.compile(original.model, dynamic=False)
    runs = {OURS: ours, ORIGINAL: original}
    return {name + what: call for name, run in runs.items() for what, call in parts(run).items()}


def decoding(args: BesideOriginalArguments, setting: Setting, config: NanoChatConfig) -> Calls:
    ours, original = our_engine(args, config), original_engine(config)
    prompt = [100 + i % 100 for i in range(args.length)]

    def generate() -> None:
        turns = [ours.turn(prompt, args.new_tokens, SamplingOptions(temperature=0)) for _ in range(args.rows)]
        ours.complete(turns, ours.sampler(0), args.rows)
        assert all(len(turn.ids) == args.new_tokens for turn in turns)

    def generate_originally() -> None:
        columns = list(original.generate(prompt, args.rows, max_tokens=args.new_tokens, temperature=0.0))
        assert len(columns) == args.new_tokens

    return {OURS + "decoding": generate, ORIGINAL + "decoding": generate_originally}


def our_engine(args: BesideOriginalArguments, config: NanoChatConfig) -> Engine:
    torch.manual_seed(0)
    model = fill_weights(ARCHITECTURES[COUNTERPARTS[args.version]][1](config))
    tokenizer = build_tokenizer({symbol: i for i, symbol in enumerate(byte_symbols())}, [])
    engine = Engine(model, tokenizer, tool=None, compile=args.torch_compile)
    engine.vocabulary = args.vocab_size  # the tokenizer's is only bytes; nothing is decoded in these measurements
    engine.codec.stop = {-1}
    return engine


class NoSpecialTokens:
    """Stands in for the original's tokenizer: no token ends a row."""

    def encode_special(self, text: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def original_engine(config: NanoChatConfig) -> Any:
    model = original_model(config, "cpu").eval()
    return importlib.import_module("nanochat.engine").Engine(model, NoSpecialTokens())


if __name__ == "__main__":
    exit_on_user_error(main)
