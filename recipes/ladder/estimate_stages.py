"""What a step of the ladder takes: steps, tokens, FLOPs, batch, memory, disk and seconds, by the stages' own rules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from evals.harness.arguments import EvaluateArguments
from evals.harness.published import BITS_PER_BYTE, CORE, parse_tasks
from modeling_nanochat import NanoChatConfig
from modeling_nanochat.sizes import parameter_counts, training_bytes, training_flops_per_token
from recipes.grpo import GRPOArguments
from recipes.midtrain import MidtrainArguments, MidtrainLoopArguments
from recipes.midtrain import make_plan as midtraining_plan
from recipes.pretrain import PretrainArguments, make_config, make_plan
from recipes.sft import SFTArguments, set_max_length
from recipes.training.arguments import LoopArguments
from recipes.training.batch_size import divisors
from recipes.training.data.mixtures import Source, parse_mixture
from recipes.training.inheritance import TYPES, Inheritance
from recipes.training.optim.hyperparameters import Plan
from recipes.training.stage import OutputArguments
from recipes.training.trl.settings import (
    PROBLEMS_PER_STEP,
    GRPOSettings,
    SFTSettings,
    parse_settings,
    passes_of_a_step,
)
from tokenizer_train.train import VOCABULARY_SIZES, TokenizerArguments

from .estimate_data import DataSizes
from .estimate_speed import Machine, rows_that_fit, step_bytes, usable
from .hardware import GIB
from .preflight import arguments, words
from .step import Step

# All assumed: loading, compiling and tokenizing before the first step; bytes/s of downloads and of checkpoints, which
# are hashed; characters/s of the tokenizer's training, two minutes for the launch's 2e9.
START_SECONDS, DOWNLOAD, DISK, TOKENIZER = 120, 100e6, 1e9, 2e9 / 120
# Examples of the CORE tasks, and tokens of each with its options and few-shot examples, such that d20 takes the
# published four minutes on 8 H100s.
CORE_EXAMPLES = (
    10042, 2117, 20321, 2376, 1172, 100, 1221, 1838, 500, 5153, 10042, 273, 1267, 1000, 230, 1320, 210, 32, 10570,
    7983, 3270, 10000,
)  # fmt: skip
CORE_TOKENS, CORE_BYTES = 4600, 0.5e9
QUESTIONS = {
    "arc_easy": 2376, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 1319, "humaneval": 164, "spelling_bee": 256,
}  # fmt: skip
SPOKEN = {"gsm8k", "humaneval", "spelling_bee"}
OTHER_QUESTIONS, PROMPT = 1000, 150  # of a task that is not published; tokens of a question


@dataclass(frozen=True)
class Estimate:
    """One line of the plan.

    Attributes:
        batch: Rows, passes, devices.
        memory: Bytes at the peak of a device.
        kept: Bytes on the disk afterwards.
        passing: Bytes that are on the disk during the step only.
        seconds: By what takes them.
        notes: What the user should know or set.
    """

    name: str
    steps: int = 0
    tokens: float = 0
    flops: float = 0
    batch: tuple[int, int, int] | None = None
    memory: float = 0
    kept: float = 0
    passing: float = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A model that a stage will have trained: its sizes, and the settings that midtraining inherits."""

    config: NanoChatConfig
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return 4 * parameter_counts(self.config)["total"]

    @property
    def checkpoint(self) -> int:
        """Bytes of weights and optimizer state."""
        counts = parameter_counts(self.config)
        return 4 * (3 * counts["total"] - counts["transformer_matrices"])


def data(step: Step, sizes: DataSizes, sources: Sequence[str]) -> Estimate:
    """Fetching text, and the `sources` on the Hub that later stages read; or generating a world."""
    conversations = sizes.conversation_bytes(sources)
    stored = sizes.text_bytes + conversations
    return Estimate(step.name, kept=stored, seconds={"download": (sizes.text_bytes + conversations / 3) / DOWNLOAD})


def tokenizer(step: Step, sizes: DataSizes) -> tuple[Estimate, int]:
    """The estimate, and the number of entries."""
    (args,) = arguments(step, TokenizerArguments)
    characters = min(args.max_chars, sizes.settings.get("pretrain_characters", args.max_chars))
    entries = args.vocab_size or VOCABULARY_SIZES[args.training_recipe]
    return Estimate(step.name, kept=4e6, seconds={"training": characters / TOKENIZER}), entries


def base(step: Step, entries: int, sizes: DataSizes, machine: Machine) -> tuple[Estimate, Trained]:
    args, loop, _ = arguments(step, PretrainArguments, LoopArguments, OutputArguments)
    config = make_config(args, loop, entries)
    plan = make_plan(config, args, loop)
    core = core_seconds(config, args.core_max_per_task, machine, machine.hardware.count) if args.core_dir else 0.0
    evaluation = core * (1 + plan.max_steps // args.core_steps if args.core_dir and args.core_steps else 1)
    evaluation += validations(plan, loop) * bits_per_byte_seconds(config, args.eval_tokens, loop.max_length, machine)
    estimate, rows = on_the_loop(step.name, config, plan, loop, machine, evaluation)
    epochs, shards = sizes.text_epochs(plan.tokens)
    notes = estimate.notes
    if epochs > 1:
        notes += (f"reads its text {epochs:.1f} times: --set data.train_shards={shards} for once",)
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
    held_out = sizes.total(parse_mixture(args.validation_mixture or [], "validation_mixture")).tokens
    held_out += everything.tokens - conversations.tokens
    evaluation = validations(plan, loop) * bits_per_byte_seconds(trained.config, held_out, loop.max_length, machine)
    most_rows = inheritance.most_rows(loop)
    return on_the_loop(step.name, trained.config, plan, loop, machine, evaluation, most_rows)[0]


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


def sft(step: Step, trained: Trained, sizes: DataSizes, machine: Machine, planned: int) -> Estimate:
    """
    Args:
        planned: Processes of the launch file.
    """
    args, training, _ = parse_settings(SFTArguments, SFTSettings, on_any_device(step))
    set_max_length(training, trained.config.max_position_embeddings)
    length, hardware = training.max_length, machine.hardware
    conversations = sizes.conversations(args).without(args.validation_share)
    rows = conversations.packed(length) if training.packing else conversations.rows
    row_tokens = conversations.tokens / rows
    per_device, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    steps = math.ceil(rows / (per_device * passes * hardware.count)) * training.num_train_epochs
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
        seconds={"steps": steps * passes * machine.eager_seconds(trained.config, per_device * row_tokens, length)},
        evaluation=evaluation,
        saves=training.save_strategy != "no",
        wanted=planned * passes // hardware.count or 1,
    )


def rl(step: Step, trained: Trained, sizes: DataSizes, machine: Machine) -> Estimate:
    args, training, given = parse_settings(GRPOArguments, GRPOSettings, on_any_device(step))
    hardware, per_device = machine.hardware, training.per_device_train_batch_size
    passes = training.gradient_accumulation_steps
    if "gradient_accumulation_steps" not in given:
        passes = passes_of_a_step(PROBLEMS_PER_STEP * training.num_generations, per_device, hardware.count)
    completions, longest = per_device * passes * hardware.count, training.max_completion_length
    problems = sizes.total(Source(name) for name in args.train_files)
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
        saves=training.save_strategy != "no",
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
    saves: bool,
    wanted: int | None = None,
) -> Estimate:
    """The estimate of a run of TRL's trainer, which is not compiled; every device holds the whole optimizer state.

    Args:
        length: The longest row, for memory and FLOPs.
        wanted: Passes of a step as large as on the devices of the launch file; None: the stage sets them itself.
    """
    hardware, config = machine.hardware, trained.config
    cuda = hardware.kind == "cuda"
    shape = {"compiled": False, "number_bytes": 2 if cuda else 4, "memory": int(hardware.gib * GIB)}
    memory = partial(training_bytes, config, length=length, **shape)
    bytes_of = {rows: memory(rows, accumulates=batch[1] > 1)["total"] for rows in divisors(batch[0])}
    fitting = next((rows for rows, size in bytes_of.items() if size <= usable(hardware)), None)
    return Estimate(
        name,
        steps=steps,
        tokens=tokens,
        flops=tokens * training_flops_per_token(config, length),
        batch=batch,
        memory=bytes_of[batch[0]],
        kept=trained.weights,
        passing=2 * trained.checkpoint if saves else 0,
        seconds={**seconds, "evaluation": evaluation, "start": START_SECONDS / 2 if cuda else 0},
        notes=trl_notes(name, batch, fitting, wanted),
    )


def trl_notes(name: str, batch: tuple[int, int, int], fitting: int | None, wanted: int | None) -> tuple[str, ...]:
    """What to set so that a pass fits, of `fitting` rows, and a step is as large as planned."""
    rows, passes, _ = batch
    if fitting is None:
        return (f"not even one row fits: --set {name}.gradient_checkpointing=true, or a lower {name}.max_length",)
    settings = [f"{name}.per_device_train_batch_size={fitting}"] if fitting < rows else []
    if wanted and (more := wanted * rows // fitting) != passes:
        settings.append(f"{name}.gradient_accumulation_steps={more}")
    why = f"{rows} rows do not fit in a pass" if fitting < rows else "steps of another size than planned"
    return (f"{why}: --set {' '.join(settings)}",) if settings else ()


def on_any_device(step: Step) -> list[str]:
    """The step's words, so that settings of a GPU are accepted without one."""
    return [*words(step), "--use_cpu", "true"]


def evaluation(step: Step, trained: Trained, machine: Machine) -> Estimate:
    """An evaluation by `evals/evaluate_model.py`: in as many processes as the step is launched with."""
    (args,) = arguments(step, EvaluateArguments)
    processes = machine.hardware.count if "--config_file" in step.program else 1
    names, config = list(parse_tasks(args.tasks)), trained.config
    seconds = machine.forward_seconds(config, args.max_text_tokens, config.max_position_embeddings, processes)
    if CORE in names:
        seconds += core_seconds(config, args.core_max_per_task, machine, processes)
    asked = [entry for entry in args.tasks if not (args.base_model and entry.partition("=")[0] != "cloze")]
    seconds += questions_seconds(asked, args, config, machine, processes, args.batch_size)
    start = START_SECONDS / 6 if machine.hardware.kind == "cuda" else 0
    return Estimate(step.name, seconds={"evaluation": seconds, "start": start})


def questions_seconds(
    tasks: Sequence[str],
    args: EvaluateArguments | SFTArguments,
    config: NanoChatConfig,
    machine: Machine,
    processes: int,
    rows: int,
) -> float:
    """Seconds of tasks of questions: a forward pass over each, and replies where they are asked for in words."""
    seconds = 0.0
    for name, source in parse_tasks(tasks).items():
        if name in (CORE, BITS_PER_BYTE):
            continue
        count = QUESTIONS.get(name, OTHER_QUESTIONS)
        count = min(count, args.max_examples or count)
        seconds += machine.forward_seconds(config, count * PROMPT, PROMPT, processes)
        if name in SPOKEN or (source and name not in ("cloze", *QUESTIONS)):
            seconds += machine.decode_seconds(config, count / processes, rows, args.max_new_tokens)
    return seconds


def core_seconds(config: NanoChatConfig, most: int | None, machine: Machine, processes: int) -> float:
    examples = sum(min(count, most) if most and most > 0 else count for count in CORE_EXAMPLES)
    return machine.forward_seconds(config, examples * CORE_TOKENS, 1024, processes)


def bits_per_byte_seconds(config: NanoChatConfig, tokens: int, length: int, machine: Machine) -> float:
    return machine.forward_seconds(config, tokens, length, machine.hardware.count)


def validations(plan: Plan, loop: LoopArguments) -> int:
    """Validations of a run: before the first step, at each interval and after the last."""
    return 2 + (plan.max_steps // loop.eval_steps if loop.eval_steps else 0)
