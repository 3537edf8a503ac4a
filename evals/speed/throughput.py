"""Measure training and decoding speed and training memory of transformers' own NanoChat and this package's models.

    python evals/speed/throughput.py
    python evals/speed/throughput.py --depths 12 20 24 --train_batch_size 16 --sequence_length 2048 \\
        --architectures plain turbo

Candidates alternate in one process, so that disturbances affect all of them alike; figures are medians. Candidates
with equal weights must agree, or the command fails; not in bfloat16, where rounding decides close choices. Memory is
that of training, each candidate in a new process: the peak, and its increase since before the first step. The last
line is JSON with all results. The first command takes about ten minutes on two CPU cores, the second is for a GPU.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch

from evals.speed.candidates import ARCHITECTURES, Model, Setting, build_model, decoders, training_steps
from evals.speed.device_peaks import device_name, device_peaks
from evals.speed.peak_memory import peak_memory
from evals.speed.timing import take_turns
from modeling_nanochat.cli import parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.sizes import decode_bytes_per_step, training_flops_per_token

LOSS_TOLERANCE = 1e-4
ResultRow = dict[str, Any]


@dataclass
class ThroughputArguments:
    """The candidates to measure, and the sizes."""

    depths: list[int] = field(default_factory=lambda: [4], metadata={"help": "Layers of the models, each measured."})
    architectures: list[str] = field(
        default_factory=lambda: list(ARCHITECTURES), metadata={"help": "Any of transformers, plain, turbo."}
    )
    torch_compile: bool = field(default=True, metadata={"help": "Also measure compiled candidates."})
    vocab_size: int = field(default=32768, metadata={"help": "Tokens in the vocabulary."})
    train_batch_size: int = field(default=4, metadata={"help": "Rows per training step; 0 skips training."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens per training row."})
    decode_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 16], metadata={"help": "Rows per decoding batch, each measured; 0 for none."}
    )
    prompt_length: int = field(default=64, metadata={"help": "Tokens per prompt."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens generated per row, greedily."})
    repeats: int = field(default=7, metadata={"help": "Timed calls per candidate."})
    memory: bool = field(
        default=True,
        metadata={"help": "Measure training's peak memory (CPU: resident; CUDA: allocated), a new process for each."},
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto: CUDA if available."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "auto: bfloat16 on CUDA."})

    def check(self) -> None:
        """Resolve `auto`; raise [`UserError`] on an invalid setting."""
        cuda = torch.cuda.is_available()
        if self.device == "auto":
            self.device = "cuda" if cuda else "cpu"
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device == "cuda" else "float32"
        if unknown := sorted(set(self.architectures) - set(ARCHITECTURES)):
            raise UserError(f"architectures: {unknown[0]!r} is not one of {', '.join(ARCHITECTURES)}")
        if self.device == "cuda" and not cuda:
            raise UserError("device cuda: torch sees no GPU; use cpu")
        least = {"train_batch_size": 0, "decode_batch_sizes": 0, "sequence_length": 2}
        for name, value in asdict(self).items():
            values = value if isinstance(value, list) else [value]
            if any(type(item) is int and item < least.get(name, 1) for item in values):
                raise UserError(f"{name} is {value}; it must be at least {least.get(name, 1)}")

    def setting(self, depth: int) -> Setting:
        context = max(2048, self.sequence_length, self.prompt_length + self.new_tokens)
        threads = torch.get_num_threads()
        return Setting(depth, self.vocab_size, context, self.device, getattr(torch, self.dtype), threads)


def main() -> None:
    (args,) = parse(ThroughputArguments)
    args.check()
    results: dict[str, Any] = {"machine": machine(args.device), "settings": asdict(args), "training": [], "decode": []}
    for part in ("machine", "settings"):
        print(", ".join(f"{key} {value}" for key, value in results[part].items()))
    for depth in args.depths:
        try:
            measure_depth(args, args.setting(depth), results)
        except (torch.OutOfMemoryError, BrokenProcessPool) as error:
            raise UserError(f"depth {depth}: out of memory; lower train_batch_size or decode_batch_sizes") from error
    print(f"\n{json.dumps(results)}")
    wrong = [row["candidate"] for row in results["training"] + results["decode"] if not row["agrees"]]
    if wrong and args.dtype == "float32":
        raise UserError(f"{', '.join(wrong)}: results differ although the weights are equal; do not compare speeds")


def measure_depth(args: ThroughputArguments, setting: Setting, results: dict[str, Any]) -> None:
    """Measure the models of one depth, print the tables, add their rows to `results`."""
    models = {name: build_model(name, setting) for name in args.architectures}
    if args.train_batch_size:
        rows = measure_training(args, setting, models)
        results["training"] += rows
        print_table(f"training, {args.train_batch_size} x {args.sequence_length} tokens", rows)
    for batch_size in filter(None, args.decode_batch_sizes):
        rows = measure_decode(args, setting, models, batch_size)
        results["decode"] += rows
        print_table(f"decode, {batch_size} x ({args.prompt_length} + {args.new_tokens}) tokens", rows)


def measure_training(args: ThroughputArguments, setting: Setting, models: dict[str, Model]) -> list[ResultRow]:
    """Return a row per candidate: tokens/s of forward and backward, MFU, loss, peak memory."""
    torch.compiler.reset()  # code compiled earlier counts towards the recompile limit
    ids = token_ids(args.train_batch_size, args.sequence_length, setting)
    steps = training_steps(models, setting, args.torch_compile)
    losses, seconds = take_turns(
        {name: partial(step, ids) for name, step in steps.items()}, setting.device, args.repeats
    )
    peak = device_peaks(device_name(setting.device))[0] if setting.dtype == torch.bfloat16 else None
    rows = speeds(setting.depth, seconds, ids.numel())
    for row in rows:
        name = row["candidate"]
        flops = training_flops_per_token(setting.config(name.split()[0]), args.sequence_length)
        row["mfu_percent"] = 100 * flops * row["tokens_per_second"] / peak if peak else None
        row["loss"] = losses[name]
        row["agrees"] = abs(losses[name] - losses[same_weights(name, losses)]) <= LOSS_TOLERANCE
        if args.memory:
            before, most = peak_memory(name, setting, ids)
            row |= {"peak_mib_over_start": (most - before) / 2**20, "peak_mib": most / 2**20}
    return rows


def measure_decode(
    args: ThroughputArguments, setting: Setting, models: dict[str, Model], batch_size: int
) -> list[ResultRow]:
    """Return a row per candidate: new tokens/s, prefill included; percentage of the memory bandwidth."""
    torch.compiler.reset()
    ids = token_ids(batch_size, args.prompt_length, setting)
    candidates = decoders(models, setting, args.torch_compile)
    calls = {name: partial(decode, ids, args.new_tokens) for name, decode in candidates.items()}
    answers, seconds = take_turns(calls, setting.device, args.repeats)
    bandwidth = device_peaks(device_name(setting.device))[1]
    rows = speeds(setting.depth, seconds, batch_size * args.new_tokens)
    for row in rows:
        name, context = row["candidate"], args.prompt_length + args.new_tokens // 2
        moved = decode_bytes_per_step(setting.config(name.split()[0]), context, batch_size, setting.dtype.itemsize)
        rate = moved * row["tokens_per_second"] / batch_size
        row["bandwidth_percent"] = 100 * rate / bandwidth if bandwidth else None
        row["batch_size"] = batch_size
        row["agrees"] = answers[name] == answers[same_weights(name, answers)]
    return rows


def speeds(depth: int, seconds: Mapping[str, Sequence[float]], tokens: int) -> list[ResultRow]:
    """Return each candidate's median speed, its spread, and its ratio to the first candidate's median."""
    medians = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    return [
        {
            "depth": depth,
            "candidate": name,
            "tokens_per_second": speed,
            "slowest": tokens / max(seconds[name]),
            "fastest": tokens / min(seconds[name]),
            "ratio": speed / first,
        }
        for name, speed in medians.items()
    ]


def same_weights(name: str, names: Mapping[str, Any]) -> str:
    """Return the first of `names` whose model has the same weights; only turbo's differ."""
    return next(other for other in names if other.startswith("turbo") == name.startswith("turbo"))


def token_ids(rows: int, length: int, setting: Setting) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, setting.vocab_size, (rows, length), generator=generator).to(setting.device)


def machine(device: str) -> ResultRow:
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def print_table(title: str, rows: Sequence[ResultRow]) -> None:
    cells = [[cell(value) for value in row.values()] for row in rows]
    print(f"\n{title}\n{text_table([list(rows[0]), *cells])}")
    print("equal weights give equal results:", cell(all(row["agrees"] for row in rows)), flush=True)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,.5g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    exit_on_user_error(main)
