"""What SFT and GRPO take, by their own settings and rules."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.sizes import training_bytes, training_flops_per_token
from recipes.grpo import GRPOArguments
from recipes.sft import SFTArguments, set_max_length
from recipes.training.batch_size import divisors
from recipes.training.trl.settings import (
    PROBLEMS_PER_STEP,
    GRPOSettings,
    SFTSettings,
    parse_settings,
    passes_of_a_step,
)

from ..preflight import words
from ..step import Step
from .data_sizes import DataSizes
from .evaluations import questions_seconds
from .hardware import GIB
from .line import START_SECONDS, Estimate, Trained
from .machine import Machine, usable


def sft(step: Step, trained: Trained, sizes: DataSizes, machine: Machine, planned: int) -> Estimate:
    """`planned`: processes of the launch file."""
    args, training, _ = parse_settings(SFTArguments, SFTSettings, on_any_device(step))
    set_max_length(training, trained.config.max_position_embeddings)
    length, hardware = training.max_length, machine.hardware
    conversations = sizes.conversations(args).without(args.validation_share)
    rows = math.ceil(conversations.tokens / length) if training.packing else conversations.rows
    row_tokens = conversations.tokens / rows
    per_device, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rounded = math.floor if training.dataloader_drop_last else math.ceil
    steps = rounded(rows / (per_device * passes * hardware.count)) * training.num_train_epochs
    steps = round(training.max_steps if training.max_steps > 0 else steps)
    tokens = steps * per_device * passes * hardware.count * row_tokens
    evaluation = 0.0
    if args.eval_tasks:
        one = questions_seconds(args.eval_tasks, args, trained.config, machine, hardware.count, 32)
        evaluation = one * (1 + steps // args.eval_tasks_steps)
    return with_trl(
        step.name,
        trained,
        machine,
        batch=(per_device, passes, hardware.count),
        length=length,
        steps=steps,
        tokens=tokens,
        seconds={
            "steps": steps * passes * machine.eager_seconds(trained.config, per_device * row_tokens, length),
            "rendering": machine.rendering_seconds(conversations.tokens),
        },
        evaluation=evaluation,
        training=training,
        wanted=planned * passes // hardware.count or 1,
    )


def rl(step: Step, trained: Trained, sizes: DataSizes, machine: Machine) -> Estimate:
    args, training, given = parse_settings(GRPOArguments, GRPOSettings, on_any_device(step))
    hardware, per_device = machine.hardware, training.per_device_train_batch_size
    passes = training.gradient_accumulation_steps
    if "gradient_accumulation_steps" not in given:
        passes = passes_of_a_step(PROBLEMS_PER_STEP * training.num_generations, per_device, hardware.count)
    completions, longest = per_device * passes * hardware.count, training.max_completion_length
    problems = sizes.conversations(args)
    steps = problems.rows * training.num_generations // completions * training.num_train_epochs
    steps = round(training.max_steps if training.max_steps > 0 else steps)
    prompt = round(problems.tokens / problems.rows / 2)  # half is the answer
    length = prompt + longest // 2
    own = completions // hardware.count
    held_out = len(args.eval_files) * args.eval_problems * args.eval_samples / hardware.count
    generation = trained.config, own, own, longest
    seconds = {
        "generation": steps * machine.decode_seconds(*generation),
        "steps": steps * passes * machine.eager_seconds(trained.config, per_device * length, length),
    }
    evaluation = machine.decode_seconds(trained.config, held_out, own, longest) if held_out else 0.0
    return with_trl(
        step.name,
        trained,
        machine,
        batch=(per_device, passes, hardware.count),
        length=prompt + longest,
        steps=steps,
        tokens=steps * completions * length,
        seconds=seconds,
        evaluation=evaluation * (2 + steps // max(1, round(training.eval_steps or steps))),
        training=training,
    )


def with_trl(
    name: str,
    trained: Trained,
    machine: Machine,
    *,
    batch: tuple[int, int, int],
    length: int,
    steps: int,
    tokens: float,
    seconds: Mapping[str, float],
    evaluation: float,
    training: SFTSettings | GRPOSettings,
    wanted: int | None = None,
) -> Estimate:
    """The estimate of a run of TRL's trainer, which is not compiled; every device holds the whole optimizer state.

    Args:
        length: The longest row, for memory and FLOPs.
        wanted: Passes of a step as large as on the devices of the launch file; None: the stage sets them itself.
    """
    hardware, config = machine.hardware, trained.config
    cuda = hardware.kind == "cuda"
    shape = {"number_bytes": 2 if cuda else 4, "memory": int(hardware.gib * GIB)}
    checkpointing = bool(training.gradient_checkpointing or getattr(training, "activation_checkpointing", False))
    memory = partial(eager_bytes, config, length=length, checkpointing=checkpointing, **shape)
    several = max(batch[1], wanted or 1) > 1  # as set, or as advised: then gradients exist during forward passes
    bytes_of = {rows: memory(rows, accumulates=several or rows < batch[0]) for rows in (*divisors(batch[0]), 0)}
    fitting = next((rows for rows, size in bytes_of.items() if size <= usable(hardware)), None)
    return Estimate(
        name,
        steps=steps,
        tokens=tokens,
        flops=tokens * training_flops_per_token(config, length),
        batch=batch,
        memory=memory(batch[0], accumulates=batch[1] > 1),
        kept=trained.weights,
        passing=2 * trained.checkpoint if training.save_strategy != "no" else 0,
        seconds={**seconds, "evaluation": evaluation, "start": START_SECONDS if cuda else 0},
        notes=trl_notes(name, batch, fitting, wanted),
    )


def eager_bytes(
    config: NanoChatConfig, rows: int, length: int, checkpointing: bool, number_bytes: int, **shape: Any
) -> float:
    """Peak bytes of a step that is not compiled; with checkpointing, of each layer only the input is kept."""
    kinds = training_bytes(config, rows, length, compiled=False, number_bytes=number_bytes, **shape)
    if not checkpointing or "activations" not in kinds:
        return kinds["total"]
    layers, inputs = config.num_hidden_layers, number_bytes * rows * length * config.hidden_size
    return kinds["total"] - kinds["activations"] * (1 - 1 / layers) + inputs * layers


def trl_notes(name: str, batch: tuple[int, int, int], fitting: int | None, wanted: int | None) -> tuple[str, ...]:
    """What to set so that a pass of `fitting` rows fits, None if not even the weights do; and the planned step."""
    rows, passes, _ = batch
    if fitting is None:
        return ("weights, gradients and optimizer do not fit: take devices with more memory, or a lower base.depth",)
    if fitting == 0:
        return (f"not even one row fits: --set {name}.gradient_checkpointing=true, or a lower {name}.max_length",)
    settings = [f"{name}.per_device_train_batch_size={fitting}"] if fitting < rows else []
    if wanted and (more := wanted * rows // fitting) != passes:
        settings.append(f"{name}.gradient_accumulation_steps={more}")
    why = f"{rows} rows do not fit in a pass" if fitting < rows else "steps of another size than planned"
    return (f"{why}: --set {' '.join(settings)}",) if settings else ()


def on_any_device(step: Step) -> list[str]:
    """The step's words, so that settings of a GPU are accepted without one."""
    return [*words(step), "--use_cpu", "true"]
