"""Writes how many rows fit into a GPU, what memory they take, and how long a run would last, by size and card.

    python recipes/benchmarks/memory_table.py --output recipes/benchmarks/memory.md

Everything is computed, by the formulas of `modeling_nanochat/sizes.py`; no GPU is needed. Speed comes from the figures of
`gpu_check` in `--speeds`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.report import markdown_table
from evals.reporting.records import write_whole
from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.sizes import parameter_counts, training_bytes, training_flops_per_token
from recipes.training.batch_size import ACCELERATOR_TOKENS, divisors
from recipes.training.optim.hyperparameters import Plan, resolve_hyperparameters

LENGTH = 2048  # tokens of a row
VOCABULARIES = {"plain": 65536, "turbo": 32768}
CARDS = {"24 GB": 23.6, "48 GB": 44.4, "80 GB": 79.2, "141 GB": 139.8}  # GiB that torch sees: RTX 4090, L40S, H100, H200
CONTEXT = 0.6  # GiB that CUDA itself takes
SPARE = 1.04  # what the allocator held on the H100, relative to what was allocated: at most 1.033
COUNTS = (1, 8)
MEASURED = {"plain": ("g3", 20), "turbo": ("g3_turbo", 24)}  # check and depth
GIB = 2**30


@dataclass
class MemoryTableArguments:
    """Where to."""

    output: str | None = field(default=None, metadata={"help": "Markdown file to write; printed if left out."})
    speeds: str = field(
        default=str(Path(__file__).parent / "results" / "h100-2026-11-26.jsonl"),
        metadata={"help": "Results of gpu_check, with g3 and g3_turbo."},
    )


@dataclass(frozen=True)
class Size:
    """A size of model and how it is trained."""

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
    text = document(read_speeds(Path(args.speeds)))
    if args.output is None:
        print(text, end="")
        return
    try:
        write_whole(Path(args.output), text)
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
    """Rows of a pass and what it takes, as `32: 61.3`."""
    rows = rows_that_fit(size.config, size.plan, gib, processes)
    return f"{rows}: {step_bytes(size.config, size.plan, rows, gib, processes) / GIB:.1f}" if rows else "–"


def rows_that_fit(config: NanoChatConfig, plan: Plan, gib: float, processes: int) -> int:
    """The most rows that divide a process's part of a step and fit into a card of `gib`; 0 if none do."""
    budget = (gib - CONTEXT) / SPARE * GIB
    sizes = divisors(plan.total_batch_size // LENGTH // processes)
    fitting = (rows for rows in sizes if step_bytes(config, plan, rows, gib, processes) <= budget)
    return next((rows for rows in fitting if rows * LENGTH <= ACCELERATOR_TOKENS), 0)


def step_bytes(config: NanoChatConfig, plan: Plan, rows: int, gib: float, processes: int) -> int:
    """Bytes at the peak of a step of one or several passes of `rows`."""
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
    """Of forward and backward pass on one card, at the share of its peak that the measured depth reaches."""
    depth = MEASURED[size.architecture][1]
    measured = Size(size.architecture, depth, size.recipe).config
    work = training_flops_per_token(measured, LENGTH) / training_flops_per_token(size.config, LENGTH)
    return speeds[size.architecture]["pass_tokens_per_second"] * work


def seconds_of_run(size: Size, speeds: dict[str, dict[str, float]], cards: int) -> float:
    """Steps of passes and one update each; the update is divided among the cards, its messages are not counted."""
    found, plan = speeds[size.architecture], size.plan
    measured = Size(size.architecture, MEASURED[size.architecture][1], size.recipe).config
    update = (found["step_ms"] - found["pass_ms"]) / 1e3 * update_work(size.config) / update_work(measured)
    passes = plan.total_batch_size / tokens_per_second(size, speeds)
    return plan.max_steps * (passes + update) / cards


def update_work(config: NanoChatConfig) -> int:
    """Muon's products grow as parameters times width."""
    return parameter_counts(config)["transformer_matrices"] * config.hidden_size


def read_speeds(path: Path) -> dict[str, dict[str, float]]:
    """What `gpu_check` has extrapolated to whole depths, by architecture.

    Raises:
        UserError: The file cannot be read, or lacks one of them.
    """
    try:
        results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"speeds {path}: cannot be read ({error}); give the output of gpu_check.py") from error
    figures: dict[str, dict[str, Any]] = {result["check"]: result["figures"] for result in results}
    speeds = {}
    for architecture, (check, depth) in MEASURED.items():
        name = f"extrapolated to {depth} layers"
        if name not in figures.get(check, {}):
            raise UserError(f"speeds {path}: {check} has no {name!r}; run gpu_check.py --only {check}")
        speeds[architecture] = figures[check][name]
    return speeds


TEMPLATE = """# Memory and time

Written by `python recipes/benchmarks/memory_table.py --output recipes/benchmarks/memory.md`; computed, not measured.

## Memory

Rows of {length:,} tokens in a pass of one card, and GiB that torch allocates there, compiled, bfloat16 over float32 weights;
– where not one row fits (there, share the model by `accelerate_configs/fsdp2.yaml`). The most rows that divide a step's
evenly, at most 131,072 tokens. On eight cards each holds all weights and gradients and an eighth of the optimizer's state.

{memory}

## Time

Of whole runs on H100s. Nothing of this was measured as a whole: a pass of d20 plain and d24 turbo is extrapolated from 4 and 8
layers on one H100 (`results/h100-2026-11-26.jsonl`, dense masks in turbo's windows), other depths take the same share of the
card's peak, and eight cards are eight times one, without the time that gradients and weights travel, data, evaluation and
checkpoints. An H200 computes as fast as an H100. Others were not measured.

{time}
"""


if __name__ == "__main__":
    exit_on_user_error(main)
