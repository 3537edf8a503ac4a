"""Checks the automatic batch size on the full card and with limited memory: no out-of-memory, good use of memory."""

import torch

from evals.bits_per_byte import nats_and_bytes
from modeling_nanochat.sizes import training_bytes
from recipes.training.arguments import LoopArguments
from recipes.training.attention import evaluation_attention
from recipes.training.batch_size import ACCELERATOR_TOKENS
from recipes.training.device import maybe_compile
from recipes.training.setup import choose_batch_size

from . import Report, Setting, free
from .runs import TrainingRun, make_batch, make_config, make_plan, make_run

LENGTH = 2048
STEP_ROWS = 256  # rows per optimizer step: 524,288 tokens
VALIDATION_ROWS = 32  # as in `recipes/training/evaluation.py`
# Depth, GiB of the card (None: all), whether to compile, which takes a minute.
CASES = ((12, 23.6, True), (20, 23.6, False), (20, None, False), (32, None, False))
LEAST_USED = 0.85  # fraction of the memory, unless the batch has its maximum size
PREDICTION = 0.1  # maximum relative error of sizes.py
GIB = 2**30


def check_memory(setting: Setting, report: Report) -> None:
    for depth, card, compiled in CASES if setting.on_gpu else ((2, None, False),):
        gib = limit_memory(card) if setting.on_gpu else 0.0
        check_case(setting, report, depth, gib, compiled)
        free()


def limit_memory(gib: float | None) -> float:
    """Limit this process to `gib`, at most the card's memory, and return the limit in GiB."""
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    fraction = min(1.0, gib / total) if gib else 1.0
    torch.cuda.set_per_process_memory_fraction(fraction)
    return fraction * total


def check_case(setting: Setting, report: Report, depth: int, gib: float, compiled: bool) -> None:
    """Choose the rows, then run steps with several passes and validations."""
    name = f"d{depth}, {gib:.0f} GiB"
    length, step_rows = (LENGTH, STEP_ROWS) if setting.on_gpu else (64, 8)
    config = make_config(setting, "plain", depth)
    run = make_run(setting, config, 1, length, compiled=False)
    plan = make_plan(config, step_rows, length)
    run.module = maybe_compile(run.module, compiled, run.accelerator)
    options = LoopArguments(max_length=length)
    rows = choose_batch_size(run.accelerator, run.module, run.optimizer, options, plan, None)
    run.batch = make_batch(setting, config, rows, length)
    precision = {"compiled": compiled, "number_bytes": setting.dtype.itemsize}
    memory = torch.cuda.get_device_properties(0).total_memory if setting.on_gpu else 0  # sets the loss's chunk size
    predicted = training_bytes(config, rows, length, **precision, memory=memory)["total"]
    found = {"rows": rows, "predicted_gib": predicted / GIB}
    free()
    fits = run_with(setting, run)
    report.holds(f"{name}: no out of memory", fits)
    if setting.on_gpu:
        peak, held = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        found |= {"peak_gib": peak, "reserved_gib": held}
        used = 1.0 if rows * length == ACCELERATOR_TOKENS else held / gib
        report.at_least(f"{name}: share of the memory that is used", used, LEAST_USED)
        report.at_most(f"{name}: prediction off by", abs(predicted / GIB / peak - 1), PREDICTION)
    report.figure(name, found)


def run_with(setting: Setting, run: TrainingRun) -> bool:
    """Run two steps of two passes, each followed by a validation; False if out of memory."""
    try:
        for _ in range(2):
            run.backward()
            run.step()
            validate(setting, run)
    except torch.OutOfMemoryError:
        return False
    return True


def validate(setting: Setting, run: TrainingRun) -> None:
    rows, length = VALIDATION_ROWS if setting.on_gpu else 2, run.batch["input_ids"].shape[1] - 1
    ids = make_batch(setting, run.model.config, rows, length)["input_ids"]
    run.model.eval()
    with torch.no_grad(), evaluation_attention(run.model), run.accelerator.autocast():
        nats_and_bytes(run.model, ids, torch.ones(run.model.config.vocab_size, dtype=torch.long))
    run.model.train()
