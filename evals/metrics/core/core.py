"""CORE: the mean centered accuracy of a base model over in-context tasks, with its standard error.

Load it with `evaluate.load("evals/metrics/core")`.
"""

import datasets
import evaluate

from .centered import binomial_error, centered, mean_centered

DESCRIPTION = "Mean over tasks of the accuracy above guessing, (accuracy - baseline) / (1 - baseline)."
INPUTS = """
Args:
    predictions (list of list of bool): for each task, whether each of its examples was answered correctly.
    references (list of float): for each task, the accuracy of guessing, in [0, 1).
Returns:
    core: mean centered accuracy; 0 is guessing, 1 is perfect.
    standard_error: of `core`, from the binomial standard errors of the tasks.
    accuracies, standard_errors, centered_accuracies: one for each task.
"""
CITATION = """\
@article{li2024datacomp,
    title = {DataComp-LM: In search of the next generation of training sets for language models},
    author = {Li, Jeffrey and Fang, Alex and Smyrnis, Georgios and others},
    journal = {arXiv preprint arXiv:2406.11794},
    year = {2024}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Core(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        grades = datasets.Sequence(datasets.Value("bool"))
        features = datasets.Features({"predictions": grades, "references": datasets.Value("float64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: list[list[bool]], references: list[float]) -> dict[str, float | list[float]]:
        accuracies = [sum(grades) / len(grades) for grades in predictions]
        counts = [len(grades) for grades in predictions]
        errors = [binomial_error(*pair) for pair in zip(accuracies, counts, strict=True)]
        core, error = mean_centered(accuracies, errors, references)
        return {
            "core": core,
            "standard_error": error,
            "accuracies": accuracies,
            "standard_errors": errors,
            "centered_accuracies": [centered(*pair) for pair in zip(accuracies, references, strict=True)],
        }
