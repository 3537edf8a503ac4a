"""Fraction of predictions that equal their reference, with its binomial standard error.

Load it with `evaluate.load("evals/metrics/exact_accuracy")`.
"""

import math

import datasets
import evaluate

DESCRIPTION = (
    "Fraction of predictions that exactly equal their reference, its standard error, and the accuracy above chance."
)
INPUTS = """
Args:
    predictions (list of str): the model's answers, already extracted from its replies.
    references (list of str): the right answers.
    baseline (float): accuracy of guessing, in [0, 1); 0 by default.
Returns:
    accuracy: fraction of equal pairs.
    standard_error: sqrt(p (1 - p) / n).
    n: number of pairs.
    centered_accuracy: (accuracy - baseline) / (1 - baseline), as in CORE: 0 is guessing, 1 is perfect.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ExactAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[str], references: list[str], baseline: float = 0.0) -> dict[str, float]:
        n = len(predictions)
        accuracy = sum(p == r for p, r in zip(predictions, references, strict=True)) / n
        return {
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
            "n": n,
            "centered_accuracy": (accuracy - baseline) / (1 - baseline),
        }
