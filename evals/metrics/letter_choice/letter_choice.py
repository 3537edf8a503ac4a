"""Accuracy of multiple choice by letter, with its standard error and the accuracy above guessing.

Load it with `evaluate.load("evals/metrics/letter_choice")`.
"""

import math
import statistics

import datasets
import evaluate

DESCRIPTION = "Fraction of questions whose predicted letter is the right one, and how far it is above guessing."
INPUTS = """
Args:
    predictions (list of str): the chosen letter of each question.
    references (list of str): the right letter of each question.
    choices (list of int): number of choices of each question; 4 by default.
Returns:
    accuracy: fraction of right letters.
    standard_error: sqrt(p (1 - p) / n).
    baseline: expected accuracy of guessing, the mean of 1 / choices.
    centered_accuracy: (accuracy - baseline) / (1 - baseline); 0 is guessing, 1 is perfect.
    n: number of questions.
"""
CITATION = """\
@article{hendrycks2020mmlu,
    title = {Measuring Massive Multitask Language Understanding},
    author = {Hendrycks, Dan and Burns, Collin and Basart, Steven and others},
    journal = {arXiv preprint arXiv:2009.03300},
    year = {2020}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class LetterChoice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(kinds),
        )

    def _compute(
        self, predictions: list[str], references: list[str], choices: list[int] | None = None
    ) -> dict[str, float]:
        n = len(references)
        accuracy = sum(given == right for given, right in zip(predictions, references, strict=True)) / n
        baseline = statistics.fmean(1 / count for count in choices or [4] * n)
        return {
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
            "baseline": baseline,
            "centered_accuracy": (accuracy - baseline) / (1 - baseline),
            "n": n,
        }
