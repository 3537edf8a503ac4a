"""CORE from the accuracies of its tasks."""

import math
from collections.abc import Sequence


def centered(value: float, baseline: float) -> float:
    """Return an accuracy on the scale where guessing is 0 and a perfect answer 1."""
    return (value - baseline) / (1 - baseline)


def binomial_error(accuracy: float, n: int) -> float:
    """Return the standard error of the share of right answers among `n`."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def mean_centered(
    accuracies: Sequence[float], standard_errors: Sequence[float], baselines: Sequence[float]
) -> tuple[float, float]:
    """Return the mean centered accuracy of several tasks, and its standard error; each task has the same weight."""
    pairs = zip(accuracies, baselines, strict=True)
    errors = [error / (1 - baseline) for error, baseline in zip(standard_errors, baselines, strict=True)]
    return math.fsum(centered(*pair) for pair in pairs) / len(accuracies), math.hypot(*errors) / len(accuracies)
