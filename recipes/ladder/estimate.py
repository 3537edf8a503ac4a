"""`run.py --dry_run`: what a recipe will take on some hardware, per step and in all. Reads settings only."""

import shutil
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from modeling_nanochat.cli import text_table
from modeling_nanochat.sizes import parameter_counts
from recipes.training.data.mixtures import parse_mixture

from . import estimate_stages as stages
from .estimate_data import DataSizes
from .estimate_speed import ASSUMED_MFU, FLOAT8_GAIN, RESULTS, Machine, architecture, read_speeds
from .estimate_stages import Estimate, Trained
from .hardware import GIB, Hardware, choose_hardware
from .step import Step, read_yaml

WIDTH = 100
GB = 1e9
HEADER = ("step", "steps", "tokens", "FLOPs", "rows x passes x devices", "GiB", "disk GB", "hours", "$")
# Minutes of pretraining's steps on 8 H100s that the original's runs have published.
PUBLISHED = {"speedrun": "172 to 194", "gpt2": "81.8", "thousand": "1,878"}


def estimate(recipe: str, steps: Sequence[Step], hardware_name: str | None) -> str:
    """The plan of a run as text: a table of its steps, and what the user should know. Writes nothing.

    Args:
        steps: All steps of the ladder, in order.
        hardware_name: As `--hardware` takes it; None: this machine's.

    Raises:
        UserError: The hardware is unknown, or a step would reject its settings.
    """
    hardware = choose_hardware(hardware_name)
    launch = launch_settings(steps)
    float8 = launch.get("mixed_precision") == "fp8"
    machine = Machine(hardware, read_speeds(*RESULTS), float8 and hardware.float8)
    sizes = DataSizes(data_settings(steps))
    estimates, trained = estimate_all(steps, sizes, machine, int(launch.get("num_processes") or 1))
    needed = peak_disk(estimates)
    lines = [*heading(recipe, hardware, trained), "", table(estimates, hardware, needed), ""]
    notes = [f"{step.name}: {note}" for step in estimates for note in step.notes]
    notes += launch_notes(launch, hardware)
    if hardware_name is None:
        notes += disk_notes(steps, needed)
    lines += wrapped("Change: ", notes)
    lines += wrapped("", [*time_lines(recipe, estimates, hardware), *assumptions(machine, trained, sizes)])
    return "\n".join(lines)


def estimate_all(
    steps: Sequence[Step], sizes: DataSizes, machine: Machine, planned: int
) -> tuple[list[Estimate], Trained | None]:
    """The estimates of the steps, and the model that pretraining makes.

    Args:
        planned: Processes of the launch file.
    """
    estimates, entries, trained = [], 0, None
    training = {"mid": stages.mid, "sft": partial(stages.sft, planned=planned), "rl": stages.rl}
    for step in steps:
        if step.name == "data":
            estimates.append(stages.data(step, sizes, sources(steps)))
        elif step.name == "tokenizer":
            found, entries = stages.tokenizer(step, sizes)
            estimates.append(found)
        elif step.name == "base":
            found, trained = stages.base(step, entries, sizes, machine)
            estimates.append(found)
        elif step.name in training:
            estimates.append(training[step.name](step, trained, sizes, machine))
        elif step.name.endswith(".eval") and trained:
            estimates.append(stages.evaluation(step, trained, machine))
    return estimates, trained


def launch_settings(steps: Sequence[Step]) -> dict:
    """The launch file of the training steps; empty for one process, which needs no launcher."""
    programs = [step.program for step in steps if "--config_file" in step.program]
    return read_yaml(Path(programs[0][programs[0].index("--config_file") + 1])) if programs else {}


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


def launch_notes(launch: dict, hardware: Hardware) -> list[str]:
    planned, notes = int(launch.get("num_processes") or 1), []
    if planned != hardware.count:
        several = f"a copy of ddp_8gpu.yaml with num_processes {hardware.count}"
        one = "accelerate_configs/" + ("single_gpu.yaml" if hardware.kind == "cuda" else "cpu.yaml")
        wanted = one if hardware.count == 1 else several
        notes.append(f"the launch file is for {planned} processes: --accelerate_config {wanted}")
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


def time_lines(recipe: str, estimates: Sequence[Estimate], hardware: Hardware) -> list[str]:
    """What takes the time of the training steps, and the original's figure beside pretraining's."""
    lines = []
    for step in (step for step in estimates if step.steps):
        parts = sorted(step.seconds.items(), key=lambda part: -part[1])
        shares = [f"{name} {duration(seconds)}" for name, seconds in parts if seconds >= 6]
        lines.append(f"{step.name}: {', '.join(shares)}")
        if step.name == "base" and recipe in PUBLISHED and hardware.name == "8xh100":
            lines[-1] += f"; published of the original's steps: {PUBLISHED[recipe]} minutes"
    return lines


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 36_000 else f"{seconds / 3600:,.1f} hours"


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
        lines.append(f"float8: {FLOAT8_GAIN} times bfloat16's speed, as measured on six layers")
    if hardware.dollars:
        lines.append("price: assumed, on demand; eight H100s as the published runs paid")
    if hardware.count > 1:
        lines.append(f"between devices: assumed {hardware.link / 1e9:.0f} GB/s")
    lines.append(
        "evaluation: assumed, CORE by the original's published four minutes; replies of half the longest length, at "
        "the chat engine's measured steps/s"
    )
    if sizes.assumed:
        lines.append(f"data, assumed: {'; '.join(sizes.assumed.values())}")
    return lines


def wrapped(label: str, entries: Sequence[str]) -> list[str]:
    wrap = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return [wrap(label + entry) for entry in entries]
