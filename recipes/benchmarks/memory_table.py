"""Writes a table of the rows that fit on a GPU, their memory, and the training time, by model size and card.

    python recipes/benchmarks/memory_table.py --output recipes/benchmarks/memory.md

All figures are computed with the formulas of `modeling_nanochat/sizes.py` and `recipes/ladder/estimate_speed.py`; no
GPU is needed. Speeds come from the results of `gpu_check` given by `--speeds`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import atomic_write
from modeling_nanochat.sizes import parameter_counts, training_flops_per_token
from recipes.ladder.estimate_speed import (
    LENGTH,
    RESULTS,
    Machine,
    Measured,
    full_size,
    read_speeds,
    rows_that_fit,
    step_bytes,
)
from recipes.ladder.hardware import GIB, Hardware, cards
from recipes.training.optim.hyperparameters import Plan, resolve_hyperparameters

COLUMNS = {"24 GB": "4090", "48 GB": "l40s", "80 GB": "h100", "141 GB": "h200"}
COUNTS = (1, 8)


@dataclass
class MemoryTableArguments:
    """Output and input files."""

    output: str | None = field(default=None, metadata={"help": "Markdown file to write; prints if unset."})
    speeds: list[str] = field(
        default_factory=lambda: list(map(str, RESULTS)),
        metadata={"help": "Results of gpu_check, including g3 and g3_turbo; of several files, the last counts."},
    )


@dataclass(frozen=True)
class Size:
    """A model size and its training recipe."""

    architecture: str
    depth: int
    recipe: str

    @property
    def name(self) -> str:
        return f"d{self.depth} {self.architecture}, {self.recipe}"

    @property
    def config(self) -> NanoChatConfig:
        return full_size(self.architecture, self.depth)

    @property
    def plan(self) -> Plan:
        return resolve_hyperparameters(self.config, self.recipe, max_length=LENGTH)


SIZES = (
    Size("plain", 12, "current"),
    Size("plain", 20, "classic"),
    Size("plain", 26, "classic"),
    Size("plain", 32, "classic"),
    Size("turbo", 24, "current"),
)


def main() -> None:
    (args,) = parse(MemoryTableArguments)
    text = document(read_speeds(*map(Path, args.speeds)))
    if args.output is None:
        print(text, end="")
        return
    try:
        atomic_write(args.output, text)
    except OSError as error:
        raise UserError(f"output {args.output}: cannot be written ({error.strerror}); give another") from error


def document(speeds: Mapping[str, Measured]) -> str:
    return TEMPLATE.format(length=LENGTH, memory=memory_table(), time=time_table(speeds))


def memory_table() -> str:
    header = ["size", "parameters", *(f"{count} × {memory}" for count in COUNTS for memory in COLUMNS)]
    rows = [
        [size.name, f"{parameter_counts(size.config)['total'] / 1e6:,.0f} M"]
        + [cell(size, cards(card, count)) for count in COUNTS for card in COLUMNS.values()]
        for size in SIZES
    ]
    return markdown_table([header, *rows])


def cell(size: Size, hardware: Hardware) -> str:
    """Rows per forward pass and GiB, as `32: 61.3`."""
    tokens = size.plan.total_batch_size
    rows = rows_that_fit(size.config, tokens, hardware)
    return f"{rows}: {step_bytes(size.config, tokens, rows, hardware) / GIB:.1f}" if rows else "–"


def time_table(speeds: Mapping[str, Measured]) -> str:
    rows = [["size", "tokens", "tokens/s of one card", *(f"{count} × H100, hours" for count in COUNTS)]]
    for size in SIZES:
        plan, machines = size.plan, [Machine(cards("h100", count), speeds) for count in COUNTS]
        rate = machines[0].flops(size.config) / training_flops_per_token(size.config, LENGTH)
        seconds = [plan.max_steps * m.step_seconds(size.config, plan.total_batch_size, LENGTH) for m in machines]
        hours = [f"{each / 3600:,.1f}" for each in seconds]
        rows.append([size.name, f"{plan.tokens / 1e9:.1f} billion", f"{rate:,.0f}", *hours])
    return markdown_table(rows)


TEMPLATE = """# Memory and time

Written by `python recipes/benchmarks/memory_table.py --output recipes/benchmarks/memory.md`; computed, not measured.

## Memory

Rows of {length:,} tokens per forward pass on one card, and GiB that torch allocates (compiled, bfloat16 autocast,
float32 weights); – where not even one row fits (shard the model with `accelerate_configs/fsdp2.yaml`). The number of
rows is the largest that divides a step evenly, up to 131,072 tokens. With eight cards, each holds all weights and
gradients and an eighth of the optimizer state.

{memory}

## Time

Entire runs on H100s. None was measured end to end: a pass of d20 plain and d24 turbo is extrapolated from few
layers on one H100 (`results/`), other depths are assumed to reach the same MFU, and eight cards to be eight times as
fast as one, except for the exchange of gradients and weights, assumed at 400 GB/s. Data, evaluation and checkpoints
are not included; `python recipes/run.py NAME --dry_run true` adds them. An H200 computes as fast as an H100. Other
cards were not measured.

{time}
"""


if __name__ == "__main__":
    exit_on_user_error(main)
