"""Learning rate, momentum and weight decay as functions of the step: nanochat's trapezoid, for both recipes."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The values of a schedule that do not depend on the run's length; the defaults are the current recipe's.

    The learning rate rises over `warmup_steps`, stays constant, and falls linearly over the last `warmdown_ratio` of
    the run to `final_lr_fraction`. Muon's momentum rises from 0.85 to `peak_momentum` over `momentum_steps` and falls
    to `final_momentum` with the warm-down; where they overlap, the rise wins. Muon's weight decay falls along a half
    cosine to `final_weight_decay_fraction`: 0 in the current recipe, 1 (constant) in the classic one.
    """

    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_fraction: float = 0.05
    momentum_steps: int = 400
    peak_momentum: float = 0.97
    final_momentum: float = 0.90
    final_weight_decay_fraction: float = 0.0


@dataclass(frozen=True)
class Schedule(Shape):
    """Multipliers and values at step `it` of `max_steps` (from 0)."""

    max_steps: int

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.max_steps)

    def learning_rate_multiplier(self, it: int) -> float:
        if it < self.warmup_steps:
            return (it + 1) / self.warmup_steps
        if it <= self.max_steps - self.warmdown_steps:
            return 1.0
        progress = (self.max_steps - it) / self.warmdown_steps
        return progress + (1 - progress) * self.final_lr_fraction

    def momentum(self, it: int) -> float:
        if it < self.momentum_steps:
            return 0.85 + (self.peak_momentum - 0.85) * it / self.momentum_steps
        start = self.max_steps - self.warmdown_steps
        if it < start or not self.warmdown_steps:
            return self.peak_momentum
        return self.peak_momentum + (self.final_momentum - self.peak_momentum) * (it - start) / self.warmdown_steps

    def weight_decay_multiplier(self, it: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * it / self.max_steps))
        return cosine + (1 - cosine) * self.final_weight_decay_fraction

    def apply(self, optimizer: torch.optim.Optimizer, it: int) -> None:
        """Set the rates of every parameter group for step `it`, from the values the group was created with."""
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * self.learning_rate_multiplier(it)
            if group["kind"] == "muon":
                group.setdefault("initial_weight_decay", group["weight_decay"])
                group["momentum"] = self.momentum(it)
                group["weight_decay"] = group["initial_weight_decay"] * self.weight_decay_multiplier(it)
