"""Two models on the same questions."""

import math
from collections.abc import Sequence


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the mean of `after` - `before`, and its standard error over questions.

    It is smaller than that of two independent accuracies, because most questions are as hard for one model as for the
    other.

    Args:
        before, after: For each question, in one order, whether the answer is right, or the share of right samples.

    Raises:
        ValueError: The lists are empty or of different length.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"paired figures need the same questions, found {len(before)} and {len(after)}")
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean = math.fsum(differences) / len(differences)
    return mean, math.sqrt(math.fsum((each - mean) ** 2 for each in differences)) / len(differences)
