"""Code that the two stages on TRL's trainers share: Muon, the learning watch, log and record as in pretraining."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.errors import UserError
from recipes.training.optim.optimizer import compiles_on, muon_adamw

from ..batch_size import first_words
from ..checkpoint import checkpoint_folders, discard
from ..learning import LearningWatch
from ..loop import advice_on_memory, gradient_norm
from ..model_card import model_card
from ..progress import LiveLine
from ..setup import end_training
from ..stage import JsonlLogger, OutputArguments, beside, finish_stage, lines_up_to, push, settings
from ..stopping import ending_together
from .settings import settings_errors

# The trainer's name -> the log's name
LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "tools/call_frequency": "tool_calls_per_completion",
    "tools/failure_frequency": "tool_failure_frequency",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "clipped_ratio",
    "num_tokens": "tokens",
}


@dataclass
class RateArguments:
    """Learning rates of the optimizer's groups; the trainer's scheduler scales all of them equally."""

    matrix_lr: float = field(default=0.02, metadata={"help": "Muon's learning rate."})
    embedding_lr: float = field(default=0.3, metadata={"help": "AdamW's rate for embeddings, at width 768."})
    unembedding_lr: float = field(default=0.008, metadata={"help": "AdamW's rate for the head, at width 768."})
    init_lr_fraction: float = field(default=1.0, metadata={"help": "Scales all three rates."})

    def scaled(self) -> dict[str, float]:
        names = ("matrix_lr", "embedding_lr", "unembedding_lr")
        return {name: getattr(self, name) * self.init_lr_fraction for name in names}


class MuonTrainer:
    """Trainer mixin: Muon and AdamW with our groups, at the rates in `muon_rates`; `learning` observes every step."""

    stage: str  # "sft" or "rl"

    def __init__(self, model: PreTrainedModel, *args: Any, muon_rates: dict[str, float], **kwargs: Any):
        self.muon_rates = muon_rates
        tokenizer = kwargs["processing_class"]
        # Older trainers would set these, with a warning; in the finished folder `set_special_tokens` sets them.
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.step_loss: torch.Tensor | float = 0.0
        super().__init__(model, *args, **kwargs)
        self.learning = LearningCallback(self)
        self.add_callback(self.learning)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            options = {"weight_decay": self.args.weight_decay, "compile": compiles_on(self.args.device)}
            self.optimizer = muon_adamw(model, **self.muon_rates, **options)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with warnings.catch_warnings():
            # TRL 1.16 uses the names from before transformers 5.24
            warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss.detach()  # each micro-batch adds its part of the step's mean
        return loss

    def newest(self, metric: str) -> float | None:
        """The trainer's last measurement since it logged: its log may have only every tenth step."""
        values = self._metrics["train"].get(metric)
        return values[-1] if values else None


class LearningCallback(TrainerCallback, ExportableState):
    """Stops training if loss or gradients are not finite; reports each sign of failed learning once."""

    def __init__(self, trainer: MuonTrainer):
        self.trainer = trainer
        self.watch = LearningWatch(trainer.stage, max_steps=0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.watch = LearningWatch(self.trainer.stage, state.max_steps)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):  # the run resumes from a checkpoint
            self.watch.load_state_dict(saved["attributes"])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Raise [`UserError`] on all processes before the optimizer uses values that are not finite."""
        loss, self.trainer.step_loss = self.trainer.step_loss, 0.0
        measured = torch.stack([torch.as_tensor(loss), gradient_norm(model).to(loss)])
        self.measured = self.trainer.accelerator.reduce(measured, "mean").tolist()  # one wait for the device
        if not torch.tensor(self.measured).isfinite().all():
            raise UserError(
                "the loss is {}, the norm of the gradients {} at step {}; the optimizer has not used them. Lower "
                "init_lr_fraction, or look at the training data".format(*self.measured, state.global_step + 1)
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        loss, grad_norm = self.measured
        all_alike = self.trainer.newest("frac_reward_zero_std")  # share of groups whose rewards are all equal
        found = self.watch.observe(
            state.global_step,
            loss=loss,
            grad_norm=None if all_alike == 1 else grad_norm,  # 0 for that reason
            reward_std=None if all_alike is None else 1 - all_alike,
            clipped_ratio=self.trainer.newest("completions/clipped_ratio"),
        )
        if state.is_world_process_zero:
            for warning in found:
                tqdm.write(f"warning: {warning}")  # above the bar
                sys.stdout.flush()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.watch.state_dict()}


class JsonlLoggerCallback(TrainerCallback):
    """Shows the progress line, and writes the trainer's measurements to the stage's log."""

    def __init__(self, log: JsonlLogger, bar: bool = True):
        self.stage_log, self.bar = log, bar
        self.last = (0.0, 0.0)
        self.live: LiveLine | None = None
        self.measured = ""
        self.curves: dict[str, list[float]] = {"loss": [], "reward": []}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.live = LiveLine(state.max_steps, state.global_step, state.is_world_process_zero, self.bar)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.live.step(state.global_step, self.measured)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs or not LOGGED.keys() & logs.keys() - {"num_tokens"}:
            return
        values = {name: float(logs[key]) for key, name in LOGGED.items() if key in logs}
        values["tokens"] = int(values.get("tokens", 0))
        values["tokens_per_second"] = self.tokens_per_second(values["tokens"])
        for name in self.curves.keys() & values.keys():
            self.curves[name].append(values[name])
        measured = [f"{name} {values[name]:.3f}" for name in self.curves if name in values]
        self.measured = ", ".join([*measured, f"{values['tokens_per_second']:,} tokens/s"])
        self.stage_log.log(step=state.global_step, **values)

    def close(self) -> None:
        if self.live:
            self.live.close()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Print how reward or loss changed."""
        self.live.close()
        name = "reward" if self.curves["reward"] else "loss"
        if (values := self.curves[name]) and len(values) > 1:
            count = max(1, len(values) // 10)
            first, last = (sum(tenth) / count for tenth in (values[:count], values[-count:]))
            line = f"{name} {last:.3f} over the last tenth of the steps, {first:.3f} over the first"
            self.live.write([f"step {state.global_step:,}: {line}"])

    def tokens_per_second(self, tokens: int) -> int:
        (seconds, before), self.last = self.last, (self.stage_log.seconds, tokens)
        return round((tokens - before) / max(self.stage_log.seconds - seconds, 1e-9))


def output_arguments(args: Any, training: TrainingArguments) -> OutputArguments:
    """The common output arguments of all stages; the trainer keeps only its checkpoints, beside the model folder.

    Raises:
        UserError: A required setting is missing. (Required fields of a dataclass cannot follow `TrainingArguments`.)
    """
    for name in ("model_name_or_path", "train_files"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; set it in the --config file or on the command line")
    output = OutputArguments(
        output_dir=training.output_dir,
        overwrite_output_dir=args.overwrite_output_dir,
        push_to_hub=training.push_to_hub,
        hub_model_id=training.hub_model_id,
        hub_private_repo=bool(training.hub_private_repo),
    )
    training.output_dir = str(beside(output.output_dir, "checkpoints", ""))
    training.push_to_hub = False
    return output


def find_checkpoint(training: TrainingArguments) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or `auto` for the newest, if there is one.

    Without it, existing checkpoints are deleted.

    Raises:
        UserError: The folder is not a checkpoint.
    """
    resume = training.resume_from_checkpoint
    if resume == "auto":
        resume = newest_whole(Path(training.output_dir))
        if resume is None and training.process_index == 0:
            print(f"no checkpoint in {training.output_dir} yet: training from the start")
    if resume is None:
        if training.process_index == 0:
            discard(Path(training.output_dir))  # of another run: a later `auto` would pick the newest
        return None
    if missing := missing_file(Path(resume)):
        raise UserError(
            f"resume_from_checkpoint {resume}: no checkpoint, {missing} is missing; give auto, or a folder such as "
            f"{training.output_dir}/checkpoint-500"
        )
    return Path(resume)


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
    checkpoints, logger = Path(training.output_dir), JsonlLoggerCallback(log, bar=not training.disable_tqdm)
    try:
        with ending_together():
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
                model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
                written = record(args, training, given, output, trainer)
                finish_stage(model, trainer.processing_class, output, log, written, model_card)
            trainer.accelerator.wait_for_everyone()
        end_training(trainer.accelerator)
        if trainer.is_world_process_zero():
            push(output)
            keep_completions(checkpoints, beside(output.output_dir, "logs", ".completions"))
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
    if hasattr(training, "num_generations"):
        wanted, what = training.generation_batch_size // training.num_generations, "problems"
        advice = "more problems, or lower per_device_train_batch_size or gradient_accumulation_steps"
    else:
        wanted, what = training.per_device_train_batch_size * training.world_size, "rows"
        wanted = wanted if training.dataloader_drop_last else 1
        advice = "more conversations, or lower per_device_train_batch_size"
    if rows < wanted:
        raise UserError(f"train_files: {rows} {what} are too few for a step, which takes {wanted}; give {advice}")


def keep_completions(checkpoints: Path, target: Path) -> None:
    """Move the files of `log_completions` beside the logs."""
    if (checkpoints / "completions").is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(checkpoints / "completions", target)


def record(
    args: Any, training: TrainingArguments, given: dict[str, Any], output: OutputArguments, trainer: MuonTrainer
) -> dict[str, Any]:
    """The stage's record: its own settings, and the trainer's that were given or depend on the device."""
    values = training.to_dict() | settings(output)
    used = {"bf16", "dataloader_pin_memory", "gradient_checkpointing", "output_dir"} | given.keys()
    if training.max_steps > 0:
        used.discard("num_train_epochs")  # it had no effect
    return {
        "stage": trainer.stage,
        "base_model": args.model_name_or_path,
        "settings": settings(args) | {key: values[key] for key in sorted(used & values.keys())},
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
