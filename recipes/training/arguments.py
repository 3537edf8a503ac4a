"""The options that pretraining and midtraining share."""

from dataclasses import dataclass, field
from typing import Literal

from modeling_nanochat.errors import UserError

from .attention import AttentionArguments, check_attention
from .optim.overrides import Overrides, check_ranges, given_or_none

Tracker = Literal[
    "none", "all", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


@dataclass
class ResumeArguments:
    """The option to resume, of every stage."""

    resume: str | None = field(
        default=None, metadata={"help": "auto: resume from the newest good checkpoint, if any; or a folder."}
    )


@dataclass
class LoopArguments(AttentionArguments, ResumeArguments):
    """Options of the training loop. Empty values are derived by `recipes/training/optim/hyperparameters.py`."""

    training_recipe: Literal["current", "classic"] = field(
        default="current", metadata={"help": "Optimizer, schedule and horizon: today's, or nanochat's launch version."}
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens per row."})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "Tokens per optimizer step, over all devices and accumulation steps."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device and forward pass; default: as many as fit."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; -1 derives them."})
    matrix_lr: float | None = field(default=None, metadata={"help": "Muon's learning rate."})
    embedding_lr: float | None = field(default=None, metadata={"help": "AdamW's rate for embeddings, at width 768."})
    unembedding_lr: float | None = field(default=None, metadata={"help": "AdamW's rate for the head, at width 768."})
    scalar_lr: float | None = field(default=None, metadata={"help": "AdamW's rate for turbo's scales."})
    weight_decay: float | None = field(default=None, metadata={"help": "Muon's weight decay at the first step."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Steps of learning rate warm-up."})
    warmdown_ratio: float | None = field(
        default=None, metadata={"help": "Share of the steps with decreasing learning rate."}
    )
    final_lr_fraction: float | None = field(default=None, metadata={"help": "Final learning rate, relative to peak."})
    momentum_steps: int | None = field(default=None, metadata={"help": "Steps until Muon's momentum peaks."})
    peak_momentum: float | None = field(default=None, metadata={"help": "Muon's momentum after momentum_steps."})
    final_momentum: float | None = field(
        default=None, metadata={"help": "Muon's momentum at the end of the decrease of the learning rate."}
    )
    document_masking: bool = field(
        default=False, metadata={"help": "Reset attention and positions at each <|bos|> within a row."}
    )
    eval_steps: int = field(default=250, metadata={"help": "Steps between validations; always after the last step."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between log entries."})
    save_steps: int = field(default=250, metadata={"help": "Steps between checkpoints; 0: only when stopped."})
    keep_checkpoint: bool = field(
        default=False, metadata={"help": "Keep the last checkpoint of a finished run, for midtraining's warm_start."}
    )
    torch_compile: bool | None = field(default=None, metadata={"help": "Compile the model; default: if that works."})
    report_to: Tracker = field(default="none", metadata={"help": "Tracker to log to: one of Accelerate's."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and data order."})

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A number is out of range, or would train nothing.
        """
        self.overrides().check(self.max_length)
        positive = ("per_device_train_batch_size", "logging_steps")
        check_ranges(
            positive={name: given_or_none(getattr(self, name)) for name in positive},
            not_negative={name: getattr(self, name) for name in ("eval_steps", "save_steps", "seed")},
            shares={},
        )
        check_attention(self.attn_implementation)
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; give one below 2^32")

    def overrides(self) -> Overrides:
        """The given steps, batch size, rates and schedule."""
        return Overrides(**{key: value for key, value in vars(self).items() if key in Overrides.__dataclass_fields__})


# May change when a run is resumed: affects measurements and speed, not the training.
FREE_TO_CHANGE = {
    "per_device_train_batch_size",
    "tokenized_cache",
    "val_files",
    "eval_steps",
    "eval_tokens",
    "core_dir",
    "core_steps",
    "core_max_per_task",
    "sample_steps",
    "sample_prompts",
    "logging_steps",
    "save_steps",
    "keep_checkpoint",
    "resume",
    "torch_compile",
    "attn_implementation",
    "report_to",
}
