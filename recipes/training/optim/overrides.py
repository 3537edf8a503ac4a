"""Hyperparameters given by the user, and the ranges they must be in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from modeling_nanochat.errors import UserError

SIZES = ("max_steps", "target_flops", "target_param_data_ratio", "total_batch_size")
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay")
STEPS = ("warmup_steps", "momentum_steps")
SHARES = ("warmdown_ratio", "final_lr_fraction", "peak_momentum", "final_momentum")
SHAPE = (*STEPS, *SHARES)


@dataclass(frozen=True)
class Overrides:
    """Values to use instead of the derived ones; None: derive it. For the first four, -1 becomes None.

    Attributes:
        max_steps: Optimizer steps.
        target_flops: Training FLOPs of the run.
        target_param_data_ratio: Training tokens per parameter, of the parameters that the recipe counts.
        total_batch_size: Tokens per optimizer step.
        matrix_lr: This and the other rates are used as given; a derived rate includes `learning_rate_factor`.
    """

    max_steps: int | None = None
    target_flops: float | None = None
    target_param_data_ratio: float | None = None
    total_batch_size: int | None = None
    matrix_lr: float | None = None
    embedding_lr: float | None = None
    unembedding_lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    momentum_steps: int | None = None
    warmdown_ratio: float | None = None
    final_lr_fraction: float | None = None
    peak_momentum: float | None = None
    final_momentum: float | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            object.__setattr__(self, name, given_or_none(getattr(self, name)))

    @property
    def rates(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in RATES}

    @property
    def shape(self) -> dict[str, float | None]:
        """The schedule's values."""
        return {name: getattr(self, name) for name in SHAPE}

    def check(self, max_length: int | None) -> None:
        """
        Args:
            max_length: Tokens per row; None: not known yet.

        Raises:
            UserError: A value is out of range, or a step is not a whole number of rows.
        """
        sizes = {name: getattr(self, name) for name in SIZES} | {"max_length": max_length}
        shares = {name: getattr(self, name) for name in SHARES}
        check_ranges(positive=sizes, not_negative=self.rates | self.shape, shares=shares)
        if self.total_batch_size and max_length and self.total_batch_size % max_length:
            raise UserError(
                f"total_batch_size {self.total_batch_size} must be a multiple of max_length {max_length}; "
                f"take {whole_rows(self.total_batch_size, max_length)}"
            )


def check_ranges(
    *,
    positive: Mapping[str, float | None],
    not_negative: Mapping[str, float | None],
    shares: Mapping[str, float | None],
) -> None:
    """
    Raises:
        UserError: A value is out of range; None is always in range.
    """
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}; give a positive number, or leave it out")
    for name, value in not_negative.items():
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{name} is {value}; it must not be negative or infinite")
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it is a share, from 0 to 1")


def given_or_none(value: float | None) -> float | None:
    """`value`, with -1 (derive it) replaced by None."""
    return None if value == -1 else value


def whole_rows(tokens: int, max_length: int) -> int:
    """The multiple of `max_length` nearest to `tokens`, at least one row."""
    return max(1, round(tokens / max_length)) * max_length
