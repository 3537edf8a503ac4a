"""Learning rate, momentum and weight decay as functions of the step: nanochat's trapezoid."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Multipliers and values at step `it` of `max_steps` (from 0).

    The learning rate rises over `warmup_steps`, stays, and falls linearly over the last `warmdown_ratio` of the run to
    `final_lr_fraction`. Muon's momentum rises from 0.85 to 0.97 over `momentum_steps` and falls to 0.90 with the
    warm-down; its weight decay falls to zero with a half cosine.
    """

    max_steps: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_fraction: float = 0.05
    momentum_steps: int = 400

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
            return 0.85 + (0.97 - 0.85) * it / self.momentum_steps
        start = self.max_steps - self.warmdown_steps
        if it < start or not self.warmdown_steps:
            return 0.97
        return 0.97 + (0.90 - 0.97) * (it - start) / self.warmdown_steps

    def weight_decay_multiplier(self, it: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * it / self.max_steps))

    def apply(self, optimizer: torch.optim.Optimizer, it: int) -> None:
        """Set the rates of every parameter group for step `it`, from the values the group was made with."""
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * self.learning_rate_multiplier(it)
            if group["kind"] == "muon":
                group.setdefault("initial_weight_decay", group["weight_decay"])
                group["momentum"] = self.momentum(it)
                group["weight_decay"] = group["initial_weight_decay"] * self.weight_decay_multiplier(it)
