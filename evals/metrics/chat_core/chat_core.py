"""ChatCORE: the mean centered accuracy of a chat model over six tasks, with its standard error.

Load it with `evaluate.load("evals/metrics/chat_core")`.
"""

import math

import datasets
import evaluate

from .six_tasks import BASELINES, chat_core

DESCRIPTION = (
    "Mean over ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval and SpellingBee of the accuracy above guessing."
)
INPUTS = f"""
Args:
    predictions (list of float): accuracy on each task.
    references (list of str): names of the tasks: {", ".join(BASELINES)}.
    standard_errors (list of float): of the accuracies; optional.
Returns:
    chat_core: mean of (accuracy - baseline) / (1 - baseline); 0 is guessing, 1 is perfect.
    standard_error: of `chat_core`; NaN without `standard_errors`.
"""
CITATION = """\
@misc{nanochat,
    author = {Andrej Karpathy},
    title = {nanochat: The best ChatGPT that $100 can buy},
    year = {2025},
    publisher = {GitHub},
    url = {https://github.com/karpathy/nanochat}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ChatCore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(kinds),
        )

    def _compute(
        self, predictions: list[float], references: list[str], standard_errors: list[float] | None = None
    ) -> dict[str, float]:
        errors = standard_errors or [math.nan] * len(predictions)
        figures = dict(zip(references, zip(predictions, errors, strict=True), strict=True))
        result = chat_core(figures)
        if result is None:
            raise ValueError(f"chat_core needs all its tasks; missing: {', '.join(BASELINES.keys() - figures.keys())}")
        return dict(zip(("chat_core", "standard_error"), result, strict=True))
