"""Measures training speed on the recipes' code path, and where the time goes.

Compiling a deep model takes minutes, so models of full width with few layers are timed and extrapolated: a pass takes
a + b x layers. One full-depth model verifies that.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from evals.speed.device_peaks import device_name, device_peaks
from evals.speed.timing import median_seconds, seconds_of
from modeling_nanochat import NanoChatConfig
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import training_flops_per_token
from recipes.training.device import is_float8

from . import Report, Setting, Skipped, free
from .profiles import idle_share, kernel_spans, longest, milliseconds_by_kind
from .runs import TrainingRun, make_batch, make_config, make_run

DEPTHS = {"plain": 20, "turbo": 24}
ROWS = {"plain": 32, "turbo": 16}  # that fit at full depth on 80 GB
LEAST_MFU = {"plain": 46.0, "turbo": 44.0}  # percent, of a pass
MOST_IDLE = 2.0  # percent
FLOAT8_STEPS = 20
FLASH = "flash_attention_3"
LEAST_FLASH_GAIN = 1.02  # in time per step; below it the default stays


def check_plain(setting: Setting, report: Report) -> None:
    check_architecture(setting, report, "plain")


def check_turbo(setting: Setting, report: Report) -> None:
    check_architecture(setting, report, "turbo")


def prepare_plain(setting: Setting) -> None:
    prepare(setting, "plain")


def prepare_turbo(setting: Setting) -> None:
    prepare(setting, "turbo")


def prepare(setting: Setting, architecture: str) -> None:
    """Compile what [`check_architecture`] will run."""
    rows, length = rows_and_length(setting, architecture)
    for layers in layer_counts(setting):
        make_run(setting, make_config(setting, architecture, DEPTHS[architecture], layers), rows, length).step()
        free()


def check_architecture(setting: Setting, report: Report, architecture: str) -> None:
    few, more = layer_counts(setting)
    rows, length = rows_and_length(setting, architecture)
    found = {}
    for layers in (few, more):
        run = make_run(setting, make_config(setting, architecture, DEPTHS[architecture], layers), rows, length)
        found[layers] = measure(setting, report, f"{layers} layers", run)
        if layers == more:
            profile_step(setting, report, run)
        del run
        free()
    full = make_config(setting, architecture, DEPTHS[architecture])
    extrapolated = {}
    for name in ("pass_ms", "step_ms"):
        slope = (found[more][name] - found[few][name]) / (more - few)
        extrapolated[name] = found[few][name] + slope * (full.num_hidden_layers - few)
        extrapolated[name.replace("_ms", "_ms_per_layer")] = slope
    extrapolated |= speeds(full, rows, length, setting, extrapolated["pass_ms"], extrapolated["step_ms"])
    report.figure(f"extrapolated to {full.num_hidden_layers} layers", extrapolated)
    if extrapolated.get("pass_mfu_percent"):
        report.at_least("MFU of a pass, %", extrapolated["pass_mfu_percent"], LEAST_MFU[architecture])


def prepare_full_depth(setting: Setting) -> None:
    """Compile what [`check_full_depth`] will run first."""
    make_run(setting, make_config(setting, "plain", DEPTHS["plain"]), *rows_and_length(setting, "plain")).step()


def check_full_depth(setting: Setting, report: Report) -> None:
    """Measure the full d20, with half the rows if memory runs out."""
    rows, length = rows_and_length(setting, "plain")
    for number in (rows, rows // 2):
        if (found := measure_full_depth(setting, report, number, length)) is not None:
            if "pass_mfu_percent" in found:
                report.at_least("MFU of a pass, %", found["pass_mfu_percent"], LEAST_MFU["plain"])
            return
        free()  # not in the except block, where the traceback keeps tensors alive
    report.holds("fits", False)


def measure_full_depth(setting: Setting, report: Report, rows: int, length: int) -> dict[str, Any] | None:
    """Speeds of the full d20; None if out of memory."""
    try:
        run = make_run(setting, make_config(setting, "plain", DEPTHS["plain"]), rows, length)
        found = measure(setting, report, f"{rows} rows", run)
        profile_step(setting, report, run)
    except torch.OutOfMemoryError as error:
        report.figure(f"{rows} rows", f"out of memory: {str(error).splitlines()[0]}")
        return None
    return found


def layer_counts(setting: Setting) -> tuple[int, int]:
    return (2, 6) if setting.on_gpu else (1, 2)


def rows_and_length(setting: Setting, architecture: str) -> tuple[int, int]:
    return (setting.rows or ROWS[architecture], 2048) if setting.on_gpu else (2, 32)


def measure(setting: Setting, report: Report, name: str, run: TrainingRun, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds of a pass and of a step, with derived speeds and memory; also added to the report."""
    device = setting.device
    first = seconds_of(run.step, device)
    step = median_seconds(run.step, device, repeats, warm_up=2)
    bare = median_seconds(run.pass_alone, device, repeats)
    rows, length = run.batch["input_ids"].shape[0], run.batch["input_ids"].shape[1] - 1
    found = {"rows": rows, "first_step_s": first, "pass_ms": 1e3 * bare, "step_ms": 1e3 * step}
    found |= speeds(run.model.config, rows, length, setting, 1e3 * bare, 1e3 * step)
    if setting.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    report.figure(name, found)
    return found


def speeds(
    config: NanoChatConfig, rows: int, length: int, setting: Setting, pass_ms: float, step_ms: float
) -> dict[str, float]:
    """Tokens/s of a pass and of a step, and their MFU if the device's peak is known."""
    peak = device_peaks(device_name(setting.device))[0] if setting.on_gpu else None
    flops = training_flops_per_token(config, length)
    found = {}
    for name, milliseconds in (("pass", pass_ms), ("step", step_ms)):
        rate = rows * length / milliseconds * 1e3
        found[f"{name}_tokens_per_second"] = rate
        if peak:
            found[f"{name}_mfu_percent"] = 100 * flops * rate / peak
    return found


def profile_step(setting: Setting, report: Report, run: TrainingRun) -> None:
    """Report the time of a pass and of the optimizer by kind of kernel."""
    spans = kernel_spans(run.backward, setting.device)
    idle = 100 * idle_share(spans)
    report.figure("pass, ms by kind", milliseconds_by_kind(spans))
    report.figure("pass, idle %", idle)
    report.figure("pass, kernels launched", len(spans))
    for kind, count in (("attention", 6), ("loss", 6), ("triton", 6), ("gemm", 6), ("aten", 6)):
        report.figure(f"longest {kind} kernels, ms", longest(spans, kind, count))
    updated = kernel_spans(run.update, setting.device)
    report.figure("optimizer, ms by kind", milliseconds_by_kind(updated))
    report.figure("optimizer, idle %", 100 * idle_share(updated))
    report.figure("optimizer, kernels launched", len(updated))
    if setting.on_gpu:
        report.at_most("idle in a pass, %", idle, MOST_IDLE)


def check_float8(setting: Setting, report: Report) -> None:
    """Compare float8 with bfloat16: speed per step, and loss after the same steps on the same batches."""
    if torch.cuda.get_device_capability() < (8, 9):
        report.figure("float8", "the device has none")
        return
    rows, length = rows_and_length(setting, "turbo")
    config = make_config(setting, "turbo", DEPTHS["turbo"], layer_counts(setting)[1])
    batches = [make_batch(setting, config, rows, length, seed=seed) for seed in range(FLOAT8_STEPS)]
    found, losses = {}, {}
    for precision in ("bf16", "fp8"):
        AcceleratorState._reset_state(True)  # it caches the process's precision
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        run = make_run(setting, config, rows, length, fill=False)
        for run.batch in batches:
            losses[precision] = run.step()
        found[precision] = measure(setting, report, precision, run)
        if precision == "fp8":
            report.figure("float8 layers", sum(is_float8(module) for module in run.model.modules()))
            report.at_least("float8 products in a pass", scaled_products(run), 1)
        del run
        free()
    report.figure(f"losses after {FLOAT8_STEPS} steps", losses)
    report.at_least("speed, fp8 / bf16", found["bf16"]["step_ms"] / found["fp8"]["step_ms"], 1.15)
    report.at_most("loss, fp8 / bf16", losses["fp8"] / losses["bf16"], 1.01)


def prepare_float8(setting: Setting) -> None:
    """Compile what [`check_float8`] will run in float8; [`prepare_turbo`] compiles the bfloat16 part."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "fp8"
    rows, length = rows_and_length(setting, "turbo")
    config = make_config(setting, "turbo", DEPTHS["turbo"], layer_counts(setting)[1])
    make_run(setting, config, rows, length, fill=False).step()


def scaled_products(run: TrainingRun) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run.pass_alone()
    return sum(event.name == "aten::_scaled_mm" for event in profiler.events())


def check_flash_attention(setting: Setting, report: Report) -> None:
    """Compare FlashAttention 3 with the default attention for turbo, to decide on `attn_implementation`."""
    rows, length = rows_and_length(setting, "turbo")
    config = make_config(setting, "turbo", DEPTHS["turbo"], layer_counts(setting)[1])
    found, losses = {}, {}
    for name in (FLASH, None):
        try:
            run = make_run(replace(setting, attn_implementation=name), config, rows, length)
        except UserError as error:
            raise Skipped(str(error)) from error
        losses[name or "default"] = run.pass_alone()
        found[name or "default"] = measure(setting, report, name or "default", run)
        del run
        free()
    report.figure("losses of the first pass", losses)
    ratio = found["default"]["step_ms"] / found[FLASH]["step_ms"]
    report.at_least(f"speed, {FLASH} / default", ratio, LEAST_FLASH_GAIN)
    report.at_most("loss, relative difference", abs(losses[FLASH] / losses["default"] - 1), 2e-3)
