"""pass@k: the probability that one of k programs written for a problem passes its tests, with its standard error.

Load it with `evaluate.load("evals/metrics/code_pass")`. It runs no code: run untrusted programs isolated, for example
with `evals/full_python.py`, and give it the outcomes.
"""

import datasets
import evaluate

from .estimate import pass_at_k

DESCRIPTION = "Unbiased estimate of the probability that at least one of k samples is right, from n >= k samples each."
INPUTS = """
Args:
    predictions (list of list of str): outcomes of the samples of each problem.
    references (list of str): the outcome of each problem that counts as right, for example "passed".
    k (list of int): numbers of samples; [1] by default.
Returns:
    pass@k: for each k, the mean over problems.
    pass@k_standard_error: its standard error over problems.
    n: number of problems.
"""
CITATION = """\
@article{chen2021codex,
    title = {Evaluating Large Language Models Trained on Code},
    author = {Chen, Mark and Tworek, Jerry and Jun, Heewoo and others},
    journal = {arXiv preprint arXiv:2107.03374},
    year = {2021}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class CodePass(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        outcomes = datasets.Sequence(datasets.Value("string"))
        features = datasets.Features({"predictions": outcomes, "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(
        self, predictions: list[list[str]], references: list[str], k: list[int] | None = None
    ) -> dict[str, float]:
        grades = [[each == right for each in samples] for samples, right in zip(predictions, references, strict=True)]
        figures: dict[str, float] = {}
        for count in k or [1]:
            figures[f"pass@{count}"], figures[f"pass@{count}_standard_error"] = pass_at_k(grades, count)
        return figures | {"n": len(grades)}
