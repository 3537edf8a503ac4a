"""What the two stages on TRL's trainers share: Muon as their optimizer, and their log in the same form as pretraining's."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_nanochat.errors import UserError

from .model_card import model_card
from .optimizer import muon_adamw
from .stage import OutputArguments, StageLog, finish_stage, push, settings

# What the trainers call it -> what the log calls it.
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
    """Learning rates of the optimizer's groups; the trainer's scheduler scales all of them alike."""

    matrix_lr: float = field(default=0.02, metadata={"help": "Muon's learning rate."})
    embedding_lr: float = field(default=0.3, metadata={"help": "AdamW's rate of the embedding, at width 768."})
    unembedding_lr: float = field(default=0.008, metadata={"help": "AdamW's rate of the head, at width 768."})
    init_lr_fraction: float = field(default=1.0, metadata={"help": "Scales all three rates."})

    def scaled(self) -> dict[str, float]:
        names = ("matrix_lr", "embedding_lr", "unembedding_lr")
        return {name: getattr(self, name) * self.init_lr_fraction for name in names}


class MuonOptimizer:
    """Mixed into a trainer: Muon and AdamW by our groups, at the rates in `muon_rates`."""

    def __init__(self, *args: Any, muon_rates: dict[str, float], **kwargs: Any):
        self.muon_rates = muon_rates
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = muon_adamw(self.model if model is None else model, **self.muon_rates)
        return self.optimizer


class StageLogCallback(TrainerCallback):
    """Copies the trainer's measurements into the stage's log."""

    def __init__(self, log: StageLog):
        self.stage_log = log
        self.last = (0.0, 0.0)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs or not LOGGED.keys() & logs.keys() - {"num_tokens"}:
            return
        values = {name: float(logs[key]) for key, name in LOGGED.items() if key in logs}
        values["tokens"] = int(values.get("tokens", 0))
        values["tokens_per_second"] = self.tokens_per_second(values["tokens"])
        self.stage_log.log(step=state.global_step, **values)

    def tokens_per_second(self, tokens: int) -> int:
        (seconds, before), self.last = self.last, (self.stage_log.seconds, tokens)
        return round((tokens - before) / max(self.stage_log.seconds - seconds, 1e-9))


def output_arguments(args: Any, training: TrainingArguments) -> OutputArguments:
    """Where the model goes, in the words of all stages; the trainer itself keeps only its checkpoints, beside that folder.

    Raises:
        UserError: A required setting is missing. (Dataclasses with a required field cannot follow `TrainingArguments`.)
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
    training.output_dir = f"{output.output_dir}.checkpoints"
    training.push_to_hub = False
    return output


def finish_trl_stage(
    stage: str, args: Any, training: TrainingArguments, trainer: Trainer, output: OutputArguments, log: StageLog
) -> None:
    """Save, record and, if asked, upload what `trainer` has trained; called by every process."""
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        finish_stage(model, trainer.processing_class, output, log, record(stage, args, training, trainer), model_card)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        push(output)


def record(stage: str, args: Any, training: TrainingArguments, trainer: Trainer) -> dict[str, Any]:
    """The stage's record; of the trainer's settings those that differ from its defaults."""
    defaults = type(training)(output_dir=training.output_dir, bf16=False).to_dict()
    changed = {key: value for key, value in training.to_dict().items() if value != defaults.get(key)}
    return {
        "stage": stage,
        "base_model": args.model_name_or_path,
        "settings": settings(args) | changed | {"output_dir": training.output_dir.removesuffix(".checkpoints")},
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen or getattr(trainer, "_total_train_tokens", 0)),
    }
