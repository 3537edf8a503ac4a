"""What data, tokenizer, pretraining and midtraining take, by their own settings and rules."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from modeling_nanochat import NanoChatConfig
from recipes.midtrain import MidtrainArguments, MidtrainLoopArguments
from recipes.midtrain import make_plan as midtraining_plan
from recipes.pretrain import PretrainArguments, make_config, make_plan
from recipes.training.arguments import LoopArguments
from recipes.training.batch_size import divisors
from recipes.training.data.mixtures import parse_mixture
from recipes.training.inheritance import TYPES, Inheritance
from recipes.training.optim.hyperparameters import Plan
from recipes.training.stage import OutputArguments
from tokenizer_train.train import VOCABULARY_SIZES, TokenizerArguments

from ..preflight import arguments
from ..step import Step
from .data_sizes import SHARD_TOKENS, DataSizes
from .evaluations import CORE_BYTES, core_seconds
from .hardware import GIB
from .line import START_SECONDS, Estimate, Trained
from .machine import Machine, rows_that_fit, step_bytes, usable

# All assumed: bytes/s of downloads and of checkpoints, which are hashed; characters/s of the tokenizer's training, two
# minutes for the launch's 2e9.
DOWNLOAD, DISK, TOKENIZER = 100e6, 1e9, 2e9 / 120


def data(step: Step, sizes: DataSizes, sources: Sequence[str], with_core: bool) -> Estimate:
    """Fetching text, and the `sources` on the Hub and CORE that later stages read; or generating a world."""
    conversations, text = sizes.conversation_bytes(sources), sizes.text_bytes + CORE_BYTES * with_core
    return Estimate(step.name, kept=text + conversations, seconds={"download": (text + conversations / 3) / DOWNLOAD})


def tokenizer(step: Step, sizes: DataSizes) -> tuple[Estimate, int]:
    """The estimate, and the number of entries."""
    (args,) = arguments(step, TokenizerArguments)
    characters = min(args.max_chars, sizes.number("pretrain_characters") or args.max_chars)
    entries = args.vocab_size or VOCABULARY_SIZES[args.training_recipe]
    return Estimate(step.name, kept=4e6, seconds={"training": characters / TOKENIZER}), entries


def base(step: Step, entries: int, sizes: DataSizes, machine: Machine) -> tuple[Estimate, Trained]:
    args, loop, _ = arguments(step, PretrainArguments, LoopArguments, OutputArguments)
    config = make_config(args, loop, entries)
    plan = make_plan(config, args, loop)
    devices = machine.hardware.count
    core = core_seconds(config, args.core_max_per_task, machine, devices) if args.core_dir else 0.0
    evaluation = core * (1 + plan.max_steps // args.core_steps if args.core_dir and args.core_steps else 1)
    evaluation += validations(plan, loop) * machine.forward_seconds(config, args.eval_tokens, loop.max_length, devices)
    estimate, rows = on_the_loop(step.name, config, plan, loop, machine, evaluation)
    notes, shards, needed = estimate.notes, sizes.number("train_shards"), plan.tokens / SHARD_TOKENS
    if needed > 1.05 * shards > 0:
        advice = f"--set data.train_shards={math.ceil(needed)} for once"
        notes += (f"reads its text {needed / shards:.1f} times: {advice}",)
    values = asdict(plan) | {"training_recipe": loop.training_recipe, "max_length": loop.max_length}
    settings = {name: values.get(name) for name in TYPES} | {"per_device_train_batch_size": rows}
    return replace(estimate, notes=notes), Trained(config, settings)


def mid(step: Step, trained: Trained, sizes: DataSizes, machine: Machine) -> Estimate:
    args, as_given, _ = arguments(step, MidtrainArguments, MidtrainLoopArguments, OutputArguments)
    inheritance = Inheritance("the base run", trained.settings)
    loop = inheritance.complete(as_given, trained.config.max_position_embeddings)
    everything = sizes.conversations(args)
    conversations = everything.without(args.validation_share)
    plan = midtraining_plan(trained.config, conversations.tokens, args, loop, inheritance.values(as_given))
    held_out = sizes.total(parse_mixture(args.validation_mixture or [], "validation_mixture"), args.max_rows).tokens
    held_out += everything.tokens - conversations.tokens
    once = machine.forward_seconds(trained.config, held_out, loop.max_length, machine.hardware.count)
    evaluation = once * validations(plan, loop)
    most_rows = inheritance.most_rows(loop)
    estimate, _ = on_the_loop(step.name, trained.config, plan, loop, machine, evaluation, most_rows)
    rendering = machine.rendering_seconds(everything.tokens + held_out)
    return replace(estimate, seconds={**estimate.seconds, "rendering": rendering})


def on_the_loop(
    name: str,
    config: NanoChatConfig,
    plan: Plan,
    loop: LoopArguments,
    machine: Machine,
    evaluation: float,
    most_rows: int | None = None,
) -> tuple[Estimate, int]:
    """The estimate of a run of our own loop, and its rows per device and pass."""
    hardware, tokens, length = machine.hardware, plan.total_batch_size, loop.max_length
    fitting = rows_that_fit(config, tokens, hardware, length, most_rows)
    rows = loop.per_device_train_batch_size or fitting or 1
    memory = step_bytes(config, tokens, rows, hardware, length)
    trained = Trained(config)
    saves = plan.max_steps // loop.save_steps if loop.save_steps else 0
    seconds = {
        "steps": plan.max_steps * machine.step_seconds(config, tokens, length),
        "evaluation": evaluation,
        "checkpoints": saves * trained.checkpoint / DISK,
        "start": START_SECONDS if hardware.kind == "cuda" else 0,
    }
    estimate = Estimate(
        name,
        steps=plan.max_steps,
        tokens=plan.tokens,
        flops=plan.flops,
        batch=(rows, max(1, tokens // (rows * length * hardware.count)), hardware.count),
        memory=memory,
        kept=trained.weights + (trained.checkpoint if loop.keep_checkpoint else 0),
        passing=(2 if saves > 1 else 1) * trained.checkpoint,
        seconds=seconds,
        notes=loop_notes(name, tokens // length, rows, fitting, memory, machine),
    )
    return estimate, rows


def loop_notes(
    name: str, rows_of_step: int, rows: int, fitting: int, memory: float, machine: Machine
) -> tuple[str, ...]:
    """What does not work on this hardware, and what to set."""
    hardware = machine.hardware
    if rows_of_step % hardware.count:
        return (f"{rows_of_step} rows a step cannot be divided among {hardware.count} devices; take another number",)
    if memory <= usable(hardware):
        if rows_of_step % (rows * hardware.count):
            whole = next(size for size in divisors(rows_of_step // hardware.count) if size <= rows)
            return (f"passes of {rows} rows do not divide the step: --set {name}.per_device_train_batch_size={whole}",)
        return ()
    needs = f"{memory / GIB:.1f} GiB for {rows} row{'s' * (rows > 1)} do not fit into {usable(hardware) / GIB:.1f}"
    if fitting:
        return (f"{needs}: --set {name}.per_device_train_batch_size={fitting}, the same training in more passes",)
    several = "shard the model with --accelerate_config accelerate_configs/fsdp2.yaml, or " * (hardware.count > 1)
    return (f"{needs}: {several}take devices with more memory, or a lower base.depth or {name}.max_length",)


def validations(plan: Plan, loop: LoopArguments) -> int:
    """Validations of a run: before the first step, at each interval and after the last."""
    return 2 + (plan.max_steps // loop.eval_steps if loop.eval_steps else 0)
