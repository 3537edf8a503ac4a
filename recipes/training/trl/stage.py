"""The code around TRL's trainers, for both stages: find the checkpoint, train, save the model, record and upload."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from evals.harness.processes import ending_together
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.errors import UserError

from ..batch_size import first_words
from ..checkpoint.folders import checkpoint_folders, discard
from ..loop import advice_on_memory
from ..model_card import model_card
from ..setup import end_training
from ..stage import JsonlLogger, OutputArguments, beside, finish_stage, lines_up_to, push, settings
from .settings import settings_errors
from .trainer import JsonlLoggerCallback, MuonTrainer


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


def find_checkpoint(training: TrainingArguments) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `auto` for the newest, if there is one.

    Without it, existing checkpoints are deleted.

    Raises:
        UserError: The folder is not a checkpoint.
    """
    folder, resume, is_main = checkpoints_of(training), training.resume_from_checkpoint, training.process_index == 0
    if resume not in (None, "auto"):
        if missing := missing_file(Path(resume)):
            raise UserError(
                f"resume_from_checkpoint {resume}: no checkpoint, {missing} is missing; give auto, or a folder such "
                f"as {folder}/checkpoint-500"
            )
        return Path(resume)
    newest = newest_whole(folder) if resume else None
    if newest is None and is_main:
        if resume:
            print(f"no checkpoint in {folder} yet: training from the start")
        discard(folder)  # of another run: a later `auto` would pick the newest
    return newest


def newest_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None if there is none."""
    complete = [path for path in checkpoint_folders(folder).values() if not missing_file(path)]
    return complete[-1] if complete else None


def missing_file(checkpoint: Path) -> str | None:
    """The first missing file of a checkpoint, or the truncated one that was written last; None if complete."""
    for name in ("trainer_state.json", "optimizer.pt"):
        if not (checkpoint / name).is_file():
            return name
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return "the end of trainer_state.json"
    return None


def start_log(output_dir: str, training: TrainingArguments, checkpoint: Path | None) -> JsonlLogger:
    """The stage's log, continued after `checkpoint`."""
    enabled = training.process_index == 0
    if checkpoint is None or not enabled:
        return JsonlLogger(output_dir, enabled)
    step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    kept = lines_up_to(beside(output_dir, "logs", ".jsonl"), step)
    return JsonlLogger(output_dir, step=step, seconds=json.loads(kept[-1])["seconds"] if kept else 0.0)


@without_cudnn_attention()  # lengths vary, and GRPO's prompts are padded on the left
def run_trl_stage(
    make_trainer: Callable[[], MuonTrainer],
    args: Any,
    training: TrainingArguments,
    given: dict[str, Any],
    output: OutputArguments,
    log: JsonlLogger,
    checkpoint: Path | None,
) -> None:
    """Train; save, record and, if requested, upload the model. Called by every process.

    Raises:
        UserError: The trainer rejects its settings, there is too little data for a step, a loss or gradient is not
            finite, or training ended before its last step.
    """
    checkpoints, logger = checkpoints_of(training), JsonlLoggerCallback(log, bar=not training.disable_tqdm)
    try:
        with ending_together("--resume_from_checkpoint auto goes on"):
            with advice_on_memory(lambda error: explain_out_of_memory(error, training)):
                with settings_errors(), no_map_bars():
                    trainer = make_trainer()
                trainer.add_callback(logger)
                for printer in (PrinterCallback, ProgressCallback):
                    trainer.remove_callback(printer)  # they would print a second bar, and dictionaries
                check_rows(training, len(trainer.train_dataset))
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
            if state.global_step < max(state.max_steps, 1):
                raise UserError(f"training ended at step {state.global_step} of {state.max_steps}; no model was saved")
            if trainer.is_world_process_zero():
                written = record(args, training, given, output, trainer)
                finish_stage(trainer.finished_model(args), trainer.processing_class, output, log, written, model_card)
            trainer.accelerator.wait_for_everyone()
        end_training(trainer.accelerator)
        if trainer.is_world_process_zero():
            push(output)
            discard(checkpoints)  # last: if saving or uploading failed, they are still there
    finally:
        logger.close()
        if training.process_index == 0:
            with suppress(OSError):  # not empty: it holds a checkpoint
                checkpoints.rmdir()
                checkpoints.parent.rmdir()


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
        "warnings": trainer.learning.watch.warnings,
    }


def run_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that define a run, as given."""
    free = {"resume_from_checkpoint", "attn_implementation", "output_dir", "overwrite_output_dir"}
    free |= {"push_to_hub", "hub_model_id", "hub_private_repo"}
    return {key: value for key, value in given.items() if key not in free}
