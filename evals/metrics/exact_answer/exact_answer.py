"""Accuracy of replies that end in `#### <number>`, as in GSM8K, with its standard error.

Load it with `evaluate.load("evals/metrics/exact_answer")`.
"""

import math

import datasets
import evaluate

from .answers import Grading, extract_answer

DESCRIPTION = "Fraction of replies whose number after `####` equals that of the worked answer."
INPUTS = """
Args:
    predictions (list of str): replies, with `#### <number>`; others count as wrong.
    references (list of str): worked answers, with `#### <number>`.
    grading (str): `number`: equal as numbers, so that 17, 17.0, $17 and 17. are the same; `original`: nanochat's rule,
        equal as strings without commas.
Returns:
    accuracy: fraction of right replies.
    standard_error: sqrt(p (1 - p) / n).
    unanswered: fraction of replies without an answer.
    n: number of replies.
"""
CITATION = """\
@article{cobbe2021gsm8k,
    title = {Training Verifiers to Solve Math Word Problems},
    author = {Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and others},
    journal = {arXiv preprint arXiv:2110.14168},
    year = {2021}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ExactAnswer(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(kinds),
        )

    def _compute(self, predictions: list[str], references: list[str], grading: Grading = "number") -> dict[str, float]:
        given, wanted = ([extract_answer(text, grading) for text in texts] for texts in (predictions, references))
        if None in wanted:
            raise ValueError(
                f"reference {wanted.index(None)} has no '#### <number>': {references[wanted.index(None)]!r}"
            )
        n = len(wanted)
        accuracy = sum(answer == right for answer, right in zip(given, wanted, strict=True)) / n
        error = math.sqrt(accuracy * (1 - accuracy) / n)
        return {"accuracy": accuracy, "standard_error": error, "unanswered": given.count(None) / n, "n": n}
