"""`run.py --dry_run`: what a recipe will take on some hardware, per step and in all. Reads settings only."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from evals.harness.published import CORE
from modeling_nanochat.cli import text_table
from modeling_nanochat.sizes import parameter_counts
from recipes.training.data.mixtures import parse_mixture

from ..step import Step, read_yaml
from . import stages, trl_stages
from .data_sizes import DataSizes
from .evaluations import evaluation
from .hardware import GIB, Hardware, choose_hardware
from .line import Estimate, Trained
from .machine import ASSUMED_MFU, FLOAT8_GAIN, RESULTS, Machine, architecture, read_speeds

WIDTH = 100
GB = 1e9
HEADER = ("step", "steps", "tokens", "FLOPs", "rows x passes x devices", "GiB", "disk GB", "hours", "$")
# Time of pretraining's steps on 8 H100s that the original's runs have published, by layers and steps.
PUBLISHED = {
    (20, 21_400): "172 to 194 min",
    (32, 71_680): "31.3 hours",
    (24, 5_568): "99 min",
    (22, 5_312): "81.8 min",
}


def estimate(recipe: str, steps: Sequence[Step], launch: Mapping[str, Any], hardware_name: str | None) -> str:
    """The plan of a run as text: a table of its steps, and what the user should know. Writes nothing.

    Args:
        steps: All steps of the ladder, in order.
        launch: Settings of the launch file.
        hardware_name: As `--hardware` takes it; None: this machine's.

    Raises:
        UserError: The hardware is unknown, or a step would reject its settings.
    """
    hardware = choose_hardware(hardware_name)
    float8 = launch.get("mixed_precision") == "fp8"
    machine = Machine(hardware, read_speeds(*RESULTS), float8 and hardware.float8)
    sizes = DataSizes(data_settings(steps))
    estimates, trained = estimate_all(steps, sizes, machine, launch.get("num_processes") or 1)
    needed = peak_disk(estimates)
    lines = [*heading(recipe, hardware, trained), "", table(estimates, hardware, needed), ""]
    notes = [f"{step.name}: {note}" for step in estimates for note in step.notes]
    notes += launch_notes(launch, hardware)
    if hardware_name is None:
        notes += disk_notes(steps, needed)
    lines += wrapped("Change: ", notes)
    lines += wrapped("", [*time_lines(estimates, trained, hardware), *assumptions(machine, trained, sizes)])
    return "\n".join(lines)


def estimate_all(
    steps: Sequence[Step], sizes: DataSizes, machine: Machine, planned: int
) -> tuple[list[Estimate], Trained | None]:
    """The estimates of the steps, and the model that pretraining makes.

    Args:
        planned: Processes of the launch file.
    """
    estimates, entries, trained = [], 0, None
    training = {"mid": stages.mid, "sft": partial(trl_stages.sft, planned=planned), "rl": trl_stages.rl}
    for step in steps:
        if step.name == "data":
            estimates.append(stages.data(step, sizes, sources(steps), reads_core(steps)))
        elif step.name == "tokenizer":
            found, entries = stages.tokenizer(step, sizes)
            estimates.append(found)
        elif step.name == "base":
            found, trained = stages.base(step, entries, sizes, machine)
            estimates.append(found)
        elif step.name in training:
            estimates.append(training[step.name](step, trained, sizes, machine))
        elif step.name.endswith(".eval") and trained:
            estimates.append(evaluation(step, trained, machine, planned))
    return estimates, trained


def settings(step: Step) -> dict[str, object]:
    """The values of a step's YAML and, before them, of its arguments."""
    given = {key: values[0] if len(values) == 1 else values for key, values in step.settings.items()}
    return (read_yaml(step.config) if step.config else {}) | given


def data_settings(steps: Sequence[Step]) -> dict[str, object]:
    return next((settings(step) for step in steps if step.name == "data"), {})


def sources(steps: Sequence[Step]) -> list[str]:
    """The conversations and problems that the training steps read."""
    names: list[str] = []
    for step in steps:
        if step.name in ("mid", "sft", "rl"):
            given = settings(step)
            for key in ("mixture", "validation_mixture", "train_files"):
                entries = given.get(key) or []
                entries = entries if isinstance(entries, list) else [entries]
                names += [source.source for source in parse_mixture(entries, f"{step.name}: {key}")]
    return list(dict.fromkeys(names))


def reads_core(steps: Sequence[Step]) -> bool:
    """Whether a step reads the bundle of CORE."""
    given = [settings(step) for step in steps if step.config]
    return any("core_dir" in each or CORE in (each.get("tasks") or ()) for each in given)


def heading(recipe: str, hardware: Hardware, trained: Trained | None) -> list[str]:
    price = f", ${hardware.dollars:.2f} an hour" if hardware.dollars else ""
    lines = [f"{recipe} on {hardware.name}: {hardware.count} x {hardware.device}, {hardware.gib:.1f} GiB each{price}"]
    if trained:
        config, total = trained.config, parameter_counts(trained.config)["total"]
        size = f"{config.num_hidden_layers} layers, {config.hidden_size:,} wide, vocabulary {config.vocab_size:,}"
        lines.append(f"{architecture(config)}: {size}, {total:,} parameters")
    return [*lines, "nothing is run or written: these are computed figures"]


def table(estimates: Sequence[Estimate], hardware: Hardware, needed: float) -> str:
    rows = [list(HEADER), *(row(each, hardware) for each in estimates)]
    seconds = sum(total_seconds(each) for each in estimates)
    flops = f"{sum(each.flops for each in estimates):.2e}"
    return text_table([*rows, ["total", "-", "-", flops, "-", "-", gigabytes(needed), *cost(seconds, hardware)]])


def row(step: Estimate, hardware: Hardware) -> list[str]:
    return [
        step.name,
        f"{step.steps:,}" if step.steps else "-",
        short(step.tokens) if step.tokens else "-",
        f"{step.flops:.2e}" if step.flops else "-",
        " x ".join(map(str, step.batch)) if step.batch else "-",
        f"{step.memory / GIB:.1f}" if step.memory else "-",
        gigabytes(step.kept + step.passing) if step.kept else "-",
        *cost(total_seconds(step), hardware),
    ]


def cost(seconds: float, hardware: Hardware) -> list[str]:
    hours = seconds / 3600
    dollars = f"{hours * hardware.dollars:,.2f}" if hardware.dollars else "-"
    return [f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}", dollars]


def total_seconds(step: Estimate) -> float:
    return sum(step.seconds.values())


def peak_disk(estimates: Sequence[Estimate]) -> float:
    """Bytes that the run takes at most: what earlier steps leave, and what a step has besides while it runs."""
    kept = peak = 0.0
    for step in estimates:
        kept += step.kept
        peak = max(peak, kept + step.passing)
    return peak


def short(number: float) -> str:
    """`11.22 B`, `400 M`, `1.4 M`."""
    size, unit = next((size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")) if number >= size)
    return f"{number / size:.3g} {unit}" if unit != "B" else f"{number / size:.2f} {unit}"


def gigabytes(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= GB else f"{size / GB:.2g}"


def launch_notes(launch: Mapping[str, Any], hardware: Hardware) -> list[str]:
    planned, notes = launch.get("num_processes") or 1, []
    one = {"cuda": "single_gpu.yaml", "cpu": "cpu.yaml", "mps": "one of one process without use_cpu"}[hardware.kind]
    wanted = one if hardware.count == 1 else f"ddp_8gpu.yaml with num_processes {hardware.count}"
    if bool(launch.get("use_cpu")) != (hardware.kind == "cpu") and launch:
        notes.append(f"the launch file is for {'the CPU' if launch.get('use_cpu') else 'GPUs'}: take {wanted}")
    elif planned != hardware.count and hardware.kind != "cpu":
        notes.append(f"the launch file is for {planned} process{'es' * (planned > 1)}: take {wanted}")
    if launch.get("mixed_precision") == "fp8" and not hardware.float8:
        notes.append(f"{hardware.device} has no float8: take a launch file with mixed_precision bf16")
    if launch.get("distributed_type") == "FSDP":
        notes.append("the launch file shards the model: a device takes less memory than shown, and more time")
    return notes


def disk_notes(steps: Sequence[Step], needed: float) -> list[str]:
    results = [step.result for step in steps if step.result]
    folder = next(parent for parent in results[0].absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return [f"{needed / GB:.1f} GB are needed, {free / GB:.1f} are free in {folder}"] if free < needed else []


def time_lines(estimates: Sequence[Estimate], trained: Trained | None, hardware: Hardware) -> list[str]:
    """What takes the time of the training steps, and the original's figure beside pretraining's."""
    lines = []
    for step in (step for step in estimates if step.steps):
        parts = sorted(step.seconds.items(), key=lambda part: -part[1])
        shares = [f"{name} {duration(seconds)}" for name, seconds in parts if seconds >= 6]
        lines.append(f"{step.name}: {', '.join(shares)}")
        run = (trained.config.num_hidden_layers, step.steps) if trained and step.name == "base" else None
        if run in PUBLISHED and hardware.name == "8xh100":
            lines[-1] += f"; published of the original's steps: {PUBLISHED[run]}"
    return lines


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 36_000 else f"{seconds / 3600:,.1f} hours"


def assumptions(machine: Machine, trained: Trained | None, sizes: DataSizes) -> list[str]:
    hardware, lines = machine.hardware, []
    if hardware.kind != "cuda":
        lines.append(f"speed: assumed {hardware.flops / 1e12:.2g} TFLOP/s in float32")
    elif machine.is_measured and trained:
        share = f"{machine.utilization(trained.config):.0%} of its bfloat16 peak"
        lines.append(f"speed: measured on one H100, {share} in a pass, extrapolated in depth")
    else:
        lines.append(f"speed: assumed {ASSUMED_MFU:.0%} of the bfloat16 peak of {hardware.flops / 1e12:.0f} TFLOP/s")
    if machine.float8:
        lines.append(f"pretraining in float8: {FLOAT8_GAIN} times bfloat16's speed, as measured on six layers")
    if hardware.dollars:
        lines.append("price: assumed, on demand; eight H100s as the published runs paid")
    if hardware.kind == "cuda":
        lines.append(f"processor: assumed {hardware.cores} cores for each device, which render the conversations")
    if hardware.count > 1:
        lines.append(f"between devices: assumed {hardware.link / 1e9:.0f} GB/s")
    lines.append(
        "evaluation: assumed, CORE by the original's published four minutes; replies of half the longest length, at "
        "the chat engine's measured steps/s"
    )
    if sizes.assumed:
        lines.append(f"data, assumed rows x tokens: {'; '.join(sizes.assumed.values())}")
    return lines


def wrapped(label: str, entries: Sequence[str]) -> list[str]:
    wrap = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return [wrap(label + entry) for entry in entries]
