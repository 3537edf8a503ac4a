"""The code around the training loop: find the checkpoint, choose the batch size, train, save the model."""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.harness.processes import ending_together
from modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.cli import is_verbose
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line
from recipes.training.data.loader import Loader
from recipes.training.data.streams import StreamMaker
from recipes.training.optim.hyperparameters import NOT_DERIVED, Plan, format_number
from recipes.training.optim.optimizer import MuonAdamW

from .arguments import FREE_TO_CHANGE, LoopArguments, ResumeArguments
from .attention import choose_attention
from .batch_size import accumulation_steps, find_batch_size, smallest
from .checkpoint.checkpoints import Checkpoint, Checkpoints
from .device import accelerator_options, is_compiled, maybe_compile
from .evaluation import Evaluation
from .inheritance import load_optimizer_state
from .learning import LearningWatch
from .loop import RunParts, accumulate, full_state_dict, prepare, train
from .model_card import model_card
from .stage import JsonlLogger, OutputArguments, beside, finish_stage, push, settings
from .stopping import Outcomes, Stopped

OUTPUT_KEYS = set(OutputArguments.__dataclass_fields__)
PATH_KEYS = {"tokenizer", "train_files", "replay_files", "model_name_or_path"}


def make_accelerator(args: LoopArguments, output_dir: str) -> Accelerator:
    """An `Accelerator` on the available device, with the requested tracker, whose files go beside the model folder.

    Raises:
        UserError: The tracker is unknown or not installed.
    """
    options = accelerator_options()
    if args.report_to == "none":
        accelerator = Accelerator(**options)
    else:
        try:
            accelerator = Accelerator(
                log_with=args.report_to, project_dir=beside(output_dir, "trackers", ""), **options
            )
        except ValueError as error:
            raise UserError(f"report_to {args.report_to}: {first_line(error)}") from error
        if not accelerator.log_with:
            package = "trackio" if args.report_to == "all" else args.report_to
            raise UserError(f"report_to {args.report_to}: not installed; pip install {package}")
        values = {key: value for key, value in vars(args).items() if value is not None}
        try:
            accelerator.init_trackers(f"nanochat-{Path(output_dir).name}", config=values)
        except Exception as error:  # trackers raise many types: no login, no network, unwritable folder
            raise UserError(
                f"report_to {args.report_to} cannot start ({first_line(error)}); set it up, or give --report_to none"
            ) from error
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates itself
    return accelerator


@dataclass(frozen=True)
class LoopStage:
    """The inputs of one run of a stage.

    Attributes:
        record: First entries of the stage's record; "stage" at least. A "given" replaces the arguments there.
        arguments: The stage's own arguments, the loop's and the output's.
        make_stream: Creates a stream of rows, see `recipes/training/data/streams.py`.
        most_rows: Rows per device and pass to choose at most, if their number is not given.
        warm_start: The checkpoint whose optimizer state a run begins with, if it does not resume.
    """

    record: dict[str, object]
    arguments: tuple[object, LoopArguments, OutputArguments]
    accelerator: Accelerator
    model: NanoChatForCausalLM
    tokenizer: PreTrainedTokenizerFast
    plan: Plan
    make_stream: StreamMaker
    evaluations: tuple[Evaluation, ...]
    most_rows: int | None = None
    warm_start: Checkpoint | None = None


def run_stage(stage: LoopStage) -> None:
    """Train, write the model folder and its record, push. If asked to stop, prints one line and returns."""
    accelerator, (_, args, output) = stage.accelerator, stage.arguments
    checkpoints = Checkpoints(beside(output.output_dir, "checkpoints", ""), accelerator)
    stopped = None
    with ending_together("--resume auto goes on"):
        try:
            train_and_write(stage, checkpoints)
        except Stopped as request:
            stopped = str(request)
        accelerator.wait_for_everyone()
    end_training(accelerator, stopped)
    if stopped:
        return
    if accelerator.is_main_process:
        push(output)
    checkpoints.delete(args.keep_checkpoint)  # last: if saving or uploading failed, --resume auto still finds them


def train_and_write(stage: LoopStage, checkpoints: Checkpoints) -> None:
    """Train, and write the model folder and the record.

    Raises:
        Stopped: The run was asked to stop.
    """
    accelerator, model, plan = stage.accelerator, stage.model, stage.plan
    _, args, output = stage.arguments
    run_config = define(*stage.arguments)
    resume_from = find_checkpoint(checkpoints, args, run_config)
    if resume_from:
        load_weights(model, resume_from)
    choose_attention(model, args.attn_implementation, args.torch_compile, accelerator)
    module, optimizer = prepare(accelerator, model, plan)
    module = maybe_compile(module, args.torch_compile, accelerator)
    batch_size = choose_batch_size(accelerator, module, optimizer, args, plan, resume_from, stage.most_rows)
    accumulation = accumulation_steps(plan.total_batch_size, batch_size, args.max_length, accelerator.num_processes)
    if accelerator.is_main_process:
        announce(model, plan, accumulation, batch_size, accelerator.num_processes, resume_from)
    step, seconds = (resume_from.step, resume_from.state.seconds) if resume_from else (0, 0.0)
    log = JsonlLogger(output.output_dir, accelerator.is_main_process, step=step, seconds=seconds)
    loader = Loader(
        stage.make_stream,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        document_start=stage.tokenizer.bos_token_id if args.document_masking else None,
    )
    watch = LearningWatch(str(stage.record["stage"]), plan.max_steps)
    run = RunParts(accelerator, model, module, optimizer, loader, log, watch, run_config)
    try:
        if resume_from:
            run.restore(resume_from)
        elif stage.warm_start:
            load_optimizer_state(optimizer, stage.warm_start)
        decode = stage.tokenizer.decode
        train_state = train(run, plan, args, checkpoints, evaluations=stage.evaluations, decode=decode)
    finally:
        loader.close()
    weights = full_state_dict(accelerator, module, model)
    if accelerator.is_main_process:
        derived = {key: value for key, value in asdict(plan).items() if key != "origins"}
        resolved = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        resolved["attn_implementation"] = model.config._attn_implementation
        record = {"given": given(*stage.arguments)} | stage.record | vars(train_state)
        record |= {"settings": settings(*stage.arguments) | derived | resolved}
        finish_stage(model, stage.tokenizer, output, log, record, model_card, weights)


def end_training(accelerator: Accelerator, message: str | None = None) -> None:
    if message and accelerator.is_main_process:
        print(message, flush=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.end_training()
    except Exception as error:  # from a tracker, see `ProgressReport.track`; the model is already written
        print(f"warning: the tracker's log may be incomplete ({first_line(error)})", flush=True)
        accelerator.state.destroy_process_group()


def given(*arguments: object) -> dict[str, Any]:
    """The settings that define a run, as given."""
    return {key: value for key, value in settings(*arguments).items() if key not in FREE_TO_CHANGE | OUTPUT_KEYS}


def define(*arguments: object) -> dict[str, object]:
    """The settings that define a run, for its checkpoints. Paths are reduced to names, because a run may be moved.

    The size of the data is checked too, see `recipes/training/data/streams.py`.
    """
    return {key: file_names(value) if key in PATH_KEYS else value for key, value in given(*arguments).items()}


def file_names(paths: str | list[str] | None) -> str | list[str] | None:
    return [Path(path).name for path in paths] if isinstance(paths, list) else paths and Path(paths).name


def find_checkpoint(
    checkpoints: Checkpoints, args: ResumeArguments, run_config: dict[str, object]
) -> Checkpoint | None:
    """The checkpoint to resume from; without `--resume`, existing checkpoints are deleted.

    Raises:
        UserError: The checkpoint is from a run with other settings; the message names the first.
    """
    if not args.resume:
        checkpoints.delete()
        checkpoints.accelerator.wait_for_everyone()
        return None
    checkpoint = checkpoints.find(args.resume)
    if checkpoint is None:
        if checkpoints.accelerator.is_main_process:
            print(f"no checkpoint in {checkpoints.folder} yet: training from the start")
        return None
    before = checkpoint.state.run_config
    changed = sorted(key for key in before.keys() | run_config.keys() if before.get(key) != run_config.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{checkpoint.folder} was trained with {key} {before.get(key)}, now it is {run_config.get(key)}; "
            "give the same, or train from scratch with --overwrite_output_dir true and without --resume"
        )
    return checkpoint


def load_weights(model: NanoChatForCausalLM, checkpoint: Checkpoint) -> None:
    """
    Raises:
        UserError: The model has other weights than the checkpoint's: that which the run began with has been replaced.
    """
    try:
        model.load_state_dict(checkpoint.weights())
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [""]
        raise UserError(
            f"{checkpoint.folder} is of another model than this run's now ({first[0].strip()}); restore that, or "
            "train from scratch with --overwrite_output_dir true and without --resume"
        ) from error


def choose_batch_size(
    accelerator: Accelerator,
    module: NanoChatForCausalLM,
    optimizer: MuonAdamW,
    args: LoopArguments,
    plan: Plan,
    resume_from: Checkpoint | None,
    most_rows: int | None = None,
) -> int:
    """Rows per pass and device: as given, as in the checkpoint, or the most that fit beside the optimizer's state.

    Args:
        most_rows: What fits is chosen up to this number.

    Raises:
        UserError: The step's rows cannot be divided evenly, or not even one row fits.
    """
    if args.per_device_train_batch_size:
        return args.per_device_train_batch_size
    rows, processes = plan.total_batch_size // args.max_length, accelerator.num_processes
    if rows % processes:
        raise UserError(
            f"total_batch_size {plan.total_batch_size} is {rows} rows, which {processes} processes cannot divide "
            f"evenly; make it a multiple of {args.max_length * processes}"
        )
    if resume_from and resume_from.state.processes == processes:
        return resume_from.state.per_device_train_batch_size  # another size would round differently

    def trial(batch_size: int) -> None:
        accumulate(accelerator, module, [trial_batch(batch_size, args)])

    return find_batch_size(
        module,
        args.max_length,
        rows // processes,
        accelerator.device,
        trial,
        # Under FSDP2, a pass that fails on one process leaves the others in a collective
        agree=Outcomes().smallest if accelerator.is_fsdp2 else partial(smallest, accelerator),
        state_bytes=sum(state.nbytes for state in optimizer.sharded_state_dict().values()),
        compiled=is_compiled(module),
        most_rows=most_rows,
    )


def trial_batch(batch_size: int, args: LoopArguments) -> dict[str, torch.Tensor]:
    """A batch like the loader's: a different one would compile to another graph, or need another mask."""
    batch = {"input_ids": torch.zeros((batch_size, args.max_length + 1), dtype=torch.long)}
    if args.document_masking:
        batch["position_ids"] = torch.arange(args.max_length).repeat(batch_size, 1)
    return batch


def announce(
    model: PreTrainedModel,
    plan: Plan,
    accumulation: int,
    batch_size: int,
    processes: int,
    resume_from: Checkpoint | None,
) -> None:
    config = model.config
    print(
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads, "
        f"vocabulary {config.vocab_size}: {model.num_parameters():,} parameters"
    )
    print("\n".join(plan.lines() if is_verbose() else plan_in_short(plan)))
    if is_verbose() or processes > 1:
        print(f"each step: {processes} processes x {accumulation} passes x {batch_size} rows")
    if resume_from:
        print(f"going on after step {resume_from.step:,}, from {resume_from.folder}")
    sys.stdout.flush()


def plan_in_short(plan: Plan) -> list[str]:
    """Steps, tokens and the derived values; `Plan.lines` tells how they were derived, the record has all values."""
    names = [name for name, origin in plan.origins.items() if origin not in NOT_DERIVED]
    derived = [f"{name} {format_number(getattr(plan, name))}" for name in names]
    steps = f"{plan.max_steps:,} steps of {plan.total_batch_size:,} tokens"
    amount = f"{steps}: {plan.tokens:,} tokens, {plan.flops:.3g} FLOPs"
    return [amount] + ([f"derived: {', '.join(derived)}"] if derived else [])
