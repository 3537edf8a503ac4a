"""What midtraining takes over from the run that trained its model: row length, batch, rates and optimizer state.

A finished run leaves a record of its settings beside the model folder. A model from the Hub has none: there, the dial
sets what is not given. A resumed run keeps the values it began with, whatever has become of the model and its record:
its checkpoints hold them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from recipes.training.optim import sharded_state
from recipes.training.optim.hyperparameters import format_number
from recipes.training.optim.optimizer import MuonAdamW, muon_adamw
from recipes.training.optim.overrides import whole_rows

from .arguments import LoopArguments
from .checkpoint.checkpoints import Checkpoint, interrupted_run
from .checkpoint.files import Damaged, verify
from .checkpoint.folders import checkpoint_folders
from .processes import on_main_process
from .stage import beside, read_record, record_path

ON_THE_LOOP = ("base", "mid")  # the stages whose records have these settings
ROWS, NUMBER = "per_device_train_batch_size", int | float
TYPES: dict[str, Any] = {  # no weight decay: the original's later stages have none
    "training_recipe": str,
    "max_length": int,
    "total_batch_size": int,
    ROWS: int,
    "matrix_lr": NUMBER,
    "embedding_lr": NUMBER,
    "unembedding_lr": NUMBER,
    "scalar_lr": NUMBER,
}
LONGEST = 2048  # tokens per row, where no record tells


@dataclass(frozen=True)
class Inheritance:
    """The settings of an earlier run, for those that were not given.

    Attributes:
        source: Where they are from, for people.
        settings: By the names of [`LoopArguments`]; empty if there is no record.
        warm_start: The checkpoint whose optimizer state to begin with.
    """

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    warm_start: Checkpoint | None = None

    def values(self, loop: LoopArguments) -> dict[str, Any]:
        """The settings that `loop` leaves open and the earlier run had; the batch in whole rows of the new length."""
        known = {name: self.settings.get(name) for name in TYPES if name != ROWS and getattr(loop, name) is None}
        values = {name: value for name, value in known.items() if value is not None}
        if "total_batch_size" in values:
            length = loop.max_length or values.get("max_length", 1)
            values["total_batch_size"] = whole_rows(values["total_batch_size"], length)
        return values

    def complete(self, loop: LoopArguments, context: int) -> LoopArguments:
        """`loop` with its open settings inherited; rates and batch may stay open, for the dial.

        Args:
            context: The model's maximum number of positions.

        Raises:
            UserError: A value is out of range.
        """
        usual = {"training_recipe": "current", "max_length": min(LONGEST, context)}
        values: dict[str, Any] = {name: value for name, value in usual.items() if getattr(loop, name) is None}
        return replace(loop, **values | self.values(loop))

    def most_rows(self, loop: LoopArguments) -> int | None:
        """Rows of the completed `loop` that have as many tokens as the earlier run's per device and pass; or None."""
        rows, length = self.settings.get(ROWS), self.settings.get("max_length")
        if not (rows and length) or loop.per_device_train_batch_size:
            return None
        return max(1, rows * length // loop.max_length)

    def line(self, loop: LoopArguments, completed: LoopArguments) -> str | None:
        """What was inherited and from where; None if everything was given."""
        if not self.settings:
            return f"{self.source}: no record of its training beside it; what is not given is set by the dial"
        parts = [f"{name} {written(getattr(completed, name))}" for name in self.values(loop)]
        if rows := self.most_rows(completed):
            parts.append(f"at most {rows:,} rows per device and pass")
        if self.warm_start:
            parts.append(f"optimizer state of step {self.warm_start.step:,}")
        return f"from {self.source}: {', '.join(parts)}" if parts else None


def find_inheritance(loop: LoopArguments, model: str, output_dir: str, warm_start: bool) -> Inheritance:
    """The settings of the interrupted run that `loop` resumes, else of the run that trained `model`. In every process.

    Args:
        warm_start: Whether to begin with the optimizer state that the run of `model` ended with.

    Raises:
        UserError: The record has a setting that no run can have; or there is no good checkpoint to begin with.
    """
    return on_main_process(lambda: interrupted(loop, output_dir) or of_model(model, warm_start))


def interrupted(loop: LoopArguments, output_dir: str) -> Inheritance | None:
    settings = interrupted_run(beside(output_dir, "checkpoints", ""), loop.resume) if loop.resume else None
    return Inheritance("the interrupted run", settings) if settings else None


def of_model(model: str, warm_start: bool) -> Inheritance:
    record = read_record(Path(os.path.abspath(model))) if os.path.isdir(model) else {}
    checkpoint = last_checkpoint(model, record) if warm_start else None
    settings = record.get("settings", {}) if record.get("stage") in ON_THE_LOOP else {}
    for name, kind in TYPES.items():
        value = settings.get(name)
        if not isinstance(value, kind | None) or (kind is int and value is not None and value < 1):
            raise UserError(f"{record_path(os.path.abspath(model))}: {name} is {value!r}; correct it")
    return Inheritance(f"the run of {model}" if settings else model, settings, checkpoint)


def last_checkpoint(model: str, record: Mapping[str, Any]) -> Checkpoint:
    """The verified checkpoint of the last step of the run that trained `model`.

    Raises:
        UserError: It was not kept, or is damaged or of another format.
    """
    folder = checkpoint_folders(beside(os.path.abspath(model), "checkpoints", "")).get(record.get("steps", -1))
    if folder is None or record.get("stage") not in ON_THE_LOOP:
        raise UserError(
            f"warm_start: no checkpoint of the last step of {model} is beside it; leave warm_start out, or train the "
            "model with --keep_checkpoint true"
        )
    try:
        verify(folder)
    except Damaged as damage:
        raise UserError(f"warm_start: {folder} is damaged ({damage}); leave warm_start out") from damage
    checkpoint = Checkpoint(folder)
    _ = checkpoint.state  # raises if it is of another format
    return checkpoint


def check_optimizer_state(model: NanoChatForCausalLM, recipe: str, checkpoint: Checkpoint) -> None:
    """Compare names and shapes of the optimizer's state with those for training `model`, without reading tensors.

    Raises:
        UserError: A state is missing, or has another shape.
    """
    with torch.device("meta"):
        without_weights = type(model)(model.config)
    optimizer = muon_adamw(without_weights, recipe=recipe, matrix_lr=0.0, embedding_lr=0.0, unembedding_lr=0.0)
    with state_errors(checkpoint):
        shards = sharded_state.shards_of(checkpoint.shards("optimizer"))
        for name, slot in optimizer.named_slots().items():
            sharded_state.check(name, slot, shards[name])


def load_optimizer_state(optimizer: MuonAdamW, checkpoint: Checkpoint) -> None:
    """Load this process's part of the optimizer's state, written by any number of processes; rates do not change.

    Raises:
        UserError: A state is missing, or has another shape.
    """
    with state_errors(checkpoint):
        optimizer.load_sharded_state_dict(checkpoint.shards("optimizer"))


@contextmanager
def state_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn errors about the state of `checkpoint` into a [`UserError`]."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"warm_start: {checkpoint.folder} is of another model or recipe ({error}); leave warm_start out"
        ) from error


def written(value: str | float) -> str:
    return value if isinstance(value, str) else format_number(value)
