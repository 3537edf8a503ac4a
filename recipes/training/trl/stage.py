"""The code around TRL's trainers, for both stages: find the checkpoint, train, save the model, record and upload."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from evals.harness.processes import ending_together
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.errors import UserError

from .. import setup
from ..arguments import FREE_TO_CHANGE, ResumeArguments
from ..batch_size import first_words
from ..checkpoint.checkpoints import Checkpoint, Checkpoints
from ..loop import advice_on_memory
from ..model_card import model_card
from ..setup import OUTPUT_KEYS, PATH_KEYS, end_training, file_names
from ..stage import JsonlLogger, OutputArguments, beside, finish_stage, push, settings
from ..stopping import Stopped
from .resume import keep_step_size
from .settings import settings_errors
from .trainer import JsonlLoggerCallback, MuonTrainer

# What may change when a run is resumed, besides what may in pretraining
FREE_TO_CHANGE_ON_TRL = {
    "gradient_accumulation_steps", "dataloader_num_workers", "dataloader_pin_memory", "ddp_timeout", "eval_files",
    "eval_problems", "eval_samples", "eval_tasks", "eval_tasks_steps", "max_examples", "max_new_tokens",
    "per_device_eval_batch_size", "save_strategy", "logging_strategy", "logging_first_step", "log_level",
    "log_completions", "num_completions_to_print", "disable_tqdm", "run_name",
}  # fmt: skip


def output_arguments(args: Any, training: TrainingArguments) -> OutputArguments:
    """The common output arguments of all stages; the trainer keeps only its checkpoints, beside the model folder.

    Raises:
        UserError: A required setting is missing. (Required fields of a dataclass cannot follow `TrainingArguments`.)
    """
    for name in ("model_name_or_path", "train_files"):
        if not getattr(args, name) and not (name == "train_files" and getattr(args, "mixture", None)):
            raise UserError(f"--{name} is missing; set it in the --config file or on the command line")
    output = OutputArguments(
        output_dir=training.output_dir or "",
        overwrite_output_dir=args.overwrite_output_dir,
        push_to_hub=training.push_to_hub,
        hub_model_id=training.hub_model_id,
        hub_private_repo=bool(training.hub_private_repo),
    )
    training.output_dir = str(beside(output.output_dir, "checkpoints", ""))
    training.push_to_hub = False
    return output


def checkpoints_of(training: TrainingArguments) -> Path:
    """The folder of the trainer's checkpoints."""
    assert training.output_dir is not None, "transformers has a default"
    return Path(training.output_dir)


def find_checkpoint(args: ResumeArguments, training: TrainingArguments, given: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to resume from; without `resume`, existing checkpoints are deleted. Called by every process.

    On another number of processes, rows and passes of each are set so that a step has as many rows as before.

    Raises:
        UserError: There is none at `resume`, it is damaged, or its run had other settings.
    """
    checkpoints = Checkpoints(checkpoints_of(training), PartialState())
    checkpoint = setup.find_checkpoint(checkpoints, args, run_config(given))
    if checkpoint:
        if training.process_index == 0:
            print(f"going on after step {checkpoint.step:,}, from {checkpoint.folder}", flush=True)
        keep_step_size(training, checkpoint)
    return checkpoint


def start_log(output_dir: str, training: TrainingArguments, checkpoint: Checkpoint | None) -> JsonlLogger:
    """The stage's log, continued after `checkpoint`."""
    step, seconds = (checkpoint.step, checkpoint.state.seconds) if checkpoint else (0, 0.0)
    return JsonlLogger(output_dir, training.process_index == 0, step=step, seconds=seconds)


@without_cudnn_attention()  # lengths vary, and GRPO's prompts are padded on the left
def run_trl_stage(
    make_trainer: Callable[[], MuonTrainer],
    args: Any,
    training: TrainingArguments,
    given: dict[str, Any],
    output: OutputArguments,
    log: JsonlLogger,
    checkpoint: Checkpoint | None,
) -> None:
    """Train; save, record and, if requested, upload the model. Called by every process.

    Raises:
        UserError: The trainer rejects its settings, there is too little data for a step, a loss or gradient is not
            finite, or training ended before its last step.
    """
    folder, logger = checkpoints_of(training), JsonlLoggerCallback(log, bar=not training.disable_tqdm)
    stop_message = None
    try:
        with ending_together("--resume auto goes on"):
            with advice_on_memory(lambda error: explain_out_of_memory(error, training)):
                with settings_errors(), no_map_bars():
                    trainer = make_trainer()
                trainer.add_callback(logger)
                for printer in (PrinterCallback, ProgressCallback):
                    trainer.remove_callback(printer)  # they would print a second bar, and dictionaries
                check_rows(training, len(trainer.train_dataset))
                checkpoints = Checkpoints(folder, trainer.accelerator)
                try:
                    trainer.train_from(checkpoint, checkpoints, run_config(given), log)
                except Stopped as request:
                    stop_message = str(request)
            if not stop_message:
                write_model(trainer, args, given, output, log)
            trainer.accelerator.wait_for_everyone()
        logger.close()
        end_training(trainer.accelerator, stop_message)
        if not stop_message and trainer.is_world_process_zero():
            push(output)
            checkpoints.delete()  # last: if saving or uploading failed, they are still there
    finally:
        logger.close()
        if training.process_index == 0:
            with suppress(OSError):  # not empty: it holds a checkpoint
                folder.rmdir()
                folder.parent.rmdir()


def write_model(
    trainer: MuonTrainer, args: Any, given: dict[str, Any], output: OutputArguments, log: JsonlLogger
) -> None:
    """Write the model folder and the record, in the main process.

    Raises:
        UserError: Training ended before its last step.
    """
    state = trainer.state
    if state.global_step < max(state.max_steps, 1):
        raise UserError(f"training ended at step {state.global_step} of {state.max_steps}; no model was saved")
    if trainer.is_world_process_zero():
        written = record(args, trainer.args, given, output, trainer)
        finish_stage(trainer.finished_model(args), trainer.processing_class, output, log, written, model_card)


def explain_out_of_memory(error: BaseException, training: TrainingArguments) -> UserError:
    """The error that names the setting to lower, and the one to raise to keep the same steps."""
    rows, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    remedy = f"set it to {rows // 2} and gradient_accumulation_steps to {2 * passes}, or " if rows % 2 == 0 else ""
    if not training.gradient_checkpointing:
        remedy += "set gradient_checkpointing to true, or "
    wanted = "max_completion_length" if hasattr(training, "max_completion_length") else "max_length"
    return UserError(
        f"out of memory with per_device_train_batch_size {rows}: {remedy}lower {wanted} ({first_words(error)})"
    )


@contextmanager
def no_map_bars() -> Iterator[None]:
    """Hide the bars that `datasets` shows for the trainer's passes over data already tokenized."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def check_rows(training: TrainingArguments, rows: int) -> None:
    """Raise [`UserError`] unless `rows` of training data are enough for one step."""
    if isinstance(training, GRPOConfig):
        assert training.generation_batch_size and training.num_generations, "TRL has defaults"
        wanted, what = training.generation_batch_size // training.num_generations, "problems"
        advice = "more problems, or lower per_device_train_batch_size or gradient_accumulation_steps"
    else:
        wanted, what = training.per_device_train_batch_size * training.world_size, "rows"
        wanted = wanted if training.dataloader_drop_last else 1
        advice = "more conversations, or lower per_device_train_batch_size"
    if rows < wanted:
        raise UserError(f"train_files: {rows} {what} are too few for a step, which takes {wanted}; give {advice}")


def record(
    args: Any, training: TrainingArguments, given: dict[str, Any], output: OutputArguments, trainer: MuonTrainer
) -> dict[str, Any]:
    """The stage's record: its own settings, and the trainer's that were given or depend on the device."""
    values = training.to_dict() | settings(output)
    used = {"bf16", "dataloader_pin_memory", "gradient_checkpointing", "output_dir"} | given.keys()
    used |= trainer.optimizer_keys
    own = {key: value for key, value in settings(args).items() if key not in trainer.unused | args.unused}
    if training.max_steps > 0:
        used.discard("num_train_epochs")  # it had no effect
    return {
        "stage": trainer.stage,
        "base_model": args.model_name_or_path,
        "settings": own | {key: values[key] for key in sorted(used & values.keys())},
        "given": run_settings(given),
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen or getattr(trainer, "_total_train_tokens", 0)),
        "warnings": trainer.watch.warnings,
    }


def run_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that define a run, as given."""
    free = OUTPUT_KEYS | {"resume", "attn_implementation"}
    return {key: value for key, value in given.items() if key not in free}


def run_config(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON holds them. Rows per step: see [`keep_step_size`]."""
    kept = {
        key: value for key, value in run_settings(given).items() if key not in FREE_TO_CHANGE | FREE_TO_CHANGE_ON_TRL
    }
    return json.loads(
        json.dumps({key: file_names(value) if key in PATH_KEYS else value for key, value in kept.items()})
    )
