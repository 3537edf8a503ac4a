"""pass@k (Chen et al. 2021, https://arxiv.org/abs/2107.03374), with its standard error over questions."""

import math
from collections.abc import Sequence


def pass_at_k(grades: Sequence[Sequence[bool]], k: int = 1) -> tuple[float, float]:
    """Return the probability that at least one of `k` samples is right, and its standard error.

    For each question it is estimated without bias from all its samples, as 1 - C(wrong, k) / C(samples, k). For k = 1
    this is the share of right samples: with one sample per question, the accuracy and its binomial standard error.

    Args:
        grades: For each question, whether each of its samples is right; at least `k` samples each.

    Raises:
        ValueError: There is no question, or one has fewer than `k` samples.
    """
    if not grades or k < 1 or min(map(len, grades)) < k:
        raise ValueError(f"pass@{k} needs at least one question, and {max(k, 1)} samples of each")
    shares = [1 - math.comb(len(each) - sum(each), k) / math.comb(len(each), k) for each in grades]
    mean = math.fsum(shares) / len(shares)
    return mean, math.sqrt(math.fsum((share - mean) ** 2 for share in shares)) / len(shares)
