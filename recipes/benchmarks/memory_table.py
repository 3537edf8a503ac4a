"""Writes a table of the rows that fit on a GPU, their memory, and the training time, by model size and card.

    python recipes/benchmarks/memory_table.py --output recipes/benchmarks/memory.md

All figures are computed with the formulas in `modeling_nanochat/sizes.py`; no GPU is needed. Speeds come from the
results of `gpu_check` given by `--speeds`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import atomic_write
from modeling_nanochat.sizes import parameter_counts, training_bytes, training_flops_per_token
from recipes.training.batch_size import ACCELERATOR_TOKENS, divisors
from recipes.training.optim.hyperparameters import Plan, resolve_hyperparameters

LENGTH = 2048  # tokens per row
VOCABULARIES = {"plain": 65536, "turbo": 32768}
# GiB that torch reports for an RTX 4090, L40S, H100 and H200.
CARDS = {"24 GB": 23.6, "48 GB": 44.4, "80 GB": 79.2, "141 GB": 139.8}
CONTEXT = 0.6  # GiB used by the CUDA context
SPARE = 1.04  # reserved / allocated memory; at most 1.033 was measured on the H100
COUNTS = (1, 8)
MEASURED = {"plain": ("g3", 20), "turbo": ("g3_turbo", 24)}  # check of gpu_check and the depth it extrapolates to
GIB = 2**30
RESULTS = [Path(__file__).parent / "results" / f"h100-2026-11-{day}.jsonl" for day in (26, 27)]


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
        sizes = {"vocab_size": VOCABULARIES[self.architecture], "max_position_embeddings": LENGTH}
        return ARCHITECTURES[self.architecture][0].from_depth(self.depth, **sizes)

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


def document(speeds: dict[str, dict[str, float]]) -> str:
    return TEMPLATE.format(length=LENGTH, memory=memory_table(), time=time_table(speeds))


def memory_table() -> str:
    header = ["size", "parameters", *(f"{count} × {card}" for count in COUNTS for card in CARDS)]
    rows = [
        [size.name, f"{parameter_counts(size.config)['total'] / 1e6:,.0f} M"]
        + [cell(size, gib, count) for count in COUNTS for gib in CARDS.values()]
        for size in SIZES
    ]
    return markdown_table([header, *rows])


def cell(size: Size, gib: float, processes: int) -> str:
    """Rows per forward pass and GiB, as `32: 61.3`."""
    rows = rows_that_fit(size.config, size.plan, gib, processes)
    return f"{rows}: {step_bytes(size.config, size.plan, rows, gib, processes) / GIB:.1f}" if rows else "–"


def rows_that_fit(config: NanoChatConfig, plan: Plan, gib: float, processes: int) -> int:
    """The most rows that divide a rank's share of a step and fit on a card of `gib`; 0 if none do."""
    budget = (gib - CONTEXT) / SPARE * GIB
    sizes = divisors(plan.total_batch_size // LENGTH // processes)
    fitting = (rows for rows in sizes if step_bytes(config, plan, rows, gib, processes) <= budget)
    return next((rows for rows in fitting if rows * LENGTH <= ACCELERATOR_TOKENS), 0)


def step_bytes(config: NanoChatConfig, plan: Plan, rows: int, gib: float, processes: int) -> int:
    """Peak bytes of a step with passes of `rows`, with gradient accumulation if the step needs several."""
    several, memory = rows * LENGTH * processes < plan.total_batch_size, int(gib * GIB)
    return training_bytes(config, rows, LENGTH, processes=processes, accumulates=several, memory=memory)["total"]


def time_table(speeds: dict[str, dict[str, float]]) -> str:
    rows = [["size", "tokens", "tokens/s of one card", *(f"{count} × H100, hours" for count in COUNTS)]]
    for size in SIZES:
        rate = tokens_per_second(size, speeds)
        hours = [f"{seconds_of_run(size, speeds, count) / 3600:,.1f}" for count in COUNTS]
        rows.append([size.name, f"{size.plan.tokens / 1e9:.1f} billion", f"{rate:,.0f}", *hours])
    return markdown_table(rows)


def tokens_per_second(size: Size, speeds: dict[str, dict[str, float]]) -> float:
    """Tokens/s of forward and backward on one card, assuming the MFU of the measured depth."""
    depth = MEASURED[size.architecture][1]
    measured = Size(size.architecture, depth, size.recipe).config
    work = training_flops_per_token(measured, LENGTH) / training_flops_per_token(size.config, LENGTH)
    return speeds[size.architecture]["pass_tokens_per_second"] * work


def seconds_of_run(size: Size, speeds: dict[str, dict[str, float]], cards: int) -> float:
    """Seconds of a run: passes and updates, both divided by the number of cards; communication is not counted."""
    found, plan = speeds[size.architecture], size.plan
    measured = Size(size.architecture, MEASURED[size.architecture][1], size.recipe).config
    update = (found["step_ms"] - found["pass_ms"]) / 1e3 * update_work(size.config) / update_work(measured)
    passes = plan.total_batch_size / tokens_per_second(size, speeds)
    return plan.max_steps * (passes + update) / cards


def update_work(config: NanoChatConfig) -> int:
    """Relative cost of Muon's matrix products, which grows as parameters times width."""
    return parameter_counts(config)["transformer_matrices"] * config.hidden_size


def read_speeds(*paths: Path) -> dict[str, dict[str, float]]:
    """Speeds that `gpu_check` extrapolated to full depth, by architecture.

    Raises:
        UserError: A file cannot be read, or they lack an architecture.
    """
    figures: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"speeds {path}: cannot be read ({error}); give the output of gpu_check.py") from error
        figures |= {result["check"]: result["figures"] for result in results}
    speeds = {}
    for architecture, (check, depth) in MEASURED.items():
        name = f"extrapolated to {depth} layers"
        if name not in figures.get(check, {}):
            raise UserError(f"speeds {paths[-1]}: {check} has no {name!r}; run gpu_check.py --only {check}")
        speeds[architecture] = figures[check][name]
    return speeds


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
fast as one. Communication, data, evaluation and checkpoints are not included. An H200 computes as fast as an H100.
Other cards were not measured.

{time}
"""


if __name__ == "__main__":
    exit_on_user_error(main)
