"""ChatCORE from the accuracies of its six tasks.

A metric is loaded from its own folder alone, so the mean of `evals/metrics/core/centered.py` is written here again.
"""

import math
from collections.abc import Mapping

# The accuracy of guessing. The tasks that are answered in words cannot be guessed.
BASELINES = {
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "mmlu": 0.25,
    "gsm8k": 0.0,
    "humaneval": 0.0,
    "spelling_bee": 0.0,
}


def chat_core(figures: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    """Return ChatCORE, the mean centered accuracy, and its standard error; None unless all six tasks are there.

    Args:
        figures: Accuracy and standard error by name of the task; others than the six are ignored.
    """
    if not BASELINES.keys() <= figures.keys():
        return None
    spans = {task: 1 - baseline for task, baseline in BASELINES.items()}
    centered = [(figures[task][0] - BASELINES[task]) / span for task, span in spans.items()]
    errors = [figures[task][1] / span for task, span in spans.items()]
    return math.fsum(centered) / len(centered), math.hypot(*errors) / len(errors)
