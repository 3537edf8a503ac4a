"""What pretraining and midtraining can be told, beside what each of them needs."""

from dataclasses import dataclass, field
from typing import Literal

from modeling_nanochat.errors import UserError

from .attention import AttentionArguments, check_attention
from .optim.hyperparameters import check_ranges, check_whole_rows, given_or_none

Tracker = Literal[
    "none", "all", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


@dataclass
class LoopArguments(AttentionArguments):
    """What pretraining and midtraining have in common. Empty values are derived: see `recipes/training/optim/hyperparameters.py`."""

    training_recipe: Literal["current", "classic"] = field(
        default="current", metadata={"help": "Optimizer, schedule and horizon: today's, or those of nanochat's launch."}
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens in a row."})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "Tokens per optimizer step, over all devices and accumulated passes."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Rows in one pass of one device; default: as many as fit."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; -1 derives them."})
    matrix_lr: float | None = field(default=None, metadata={"help": "Muon's learning rate."})
    embedding_lr: float | None = field(default=None, metadata={"help": "AdamW's rate of the embedding, at width 768."})
    unembedding_lr: float | None = field(default=None, metadata={"help": "AdamW's rate of the head, at width 768."})
    scalar_lr: float | None = field(default=None, metadata={"help": "AdamW's rate of turbo's scales."})
    weight_decay: float | None = field(default=None, metadata={"help": "Muon's weight decay at the first step."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Steps of rising learning rate."})
    warmdown_ratio: float | None = field(default=None, metadata={"help": "Share of the steps with falling learning rate."})
    final_lr_fraction: float | None = field(default=None, metadata={"help": "Learning rate at the end, relative."})
    momentum_steps: int | None = field(default=None, metadata={"help": "Steps until Muon's momentum is at its highest."})
    document_masking: bool = field(
        default=False, metadata={"help": "Attention and positions start anew at each <|bos|> within a row."}
    )
    eval_steps: int = field(default=250, metadata={"help": "Steps between validations; the last step always has one."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two entries of the log."})
    save_steps: int = field(default=250, metadata={"help": "Steps between checkpoints; 0: only when stopped."})
    resume: str | None = field(
        default=None, metadata={"help": "auto: go on from the newest good checkpoint, if any; or a checkpoint's folder."}
    )
    torch_compile: bool | None = field(default=None, metadata={"help": "Compile the model; default: where that works."})
    report_to: Tracker = field(default="none", metadata={"help": "Where else to log: one of Accelerate's trackers."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and data order."})

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A number that no run can have, or that would train nothing.
        """
        sizes = ("max_length", "total_batch_size", "per_device_train_batch_size", "max_steps", "logging_steps")
        shares = ("warmdown_ratio", "final_lr_fraction")
        others = {"eval_steps": self.eval_steps, "save_steps": self.save_steps, "seed": self.seed}
        check_ranges(
            positive={name: given_or_none(getattr(self, name)) for name in sizes},
            not_negative={name: rate for name, rate in self.rates().items() if name not in sizes} | others,
            shares={name: getattr(self, name) for name in shares},
        )
        check_whole_rows(given_or_none(self.total_batch_size), self.max_length)
        check_attention(self.attn_implementation)
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; give one below 2^32")

    def rates(self) -> dict[str, float | int | None]:
        """Batch and schedule as far as they are given, by the names that `recipes.training.optim.hyperparameters.resolve_hyperparameters` has for them."""
        return {name: getattr(self, name) for name in RATES}


RATES = (
    "total_batch_size",
    "matrix_lr",
    "embedding_lr",
    "unembedding_lr",
    "scalar_lr",
    "weight_decay",
    "warmup_steps",
    "warmdown_ratio",
    "final_lr_fraction",
    "momentum_steps",
)
# What may differ between a run and its continuation: it changes what is measured and how fast, not what is learnt.
FREE_TO_CHANGE = {
    "per_device_train_batch_size",
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
    "resume",
    "torch_compile",
    "attn_implementation",
    "report_to",
}
