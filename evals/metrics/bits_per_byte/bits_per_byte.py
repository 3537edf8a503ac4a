"""Bits per byte from the loss in nats and the bytes of each row of text, with its standard error.

Load it with `evaluate.load("evals/metrics/bits_per_byte")`.
"""

import math

import datasets
import evaluate

DESCRIPTION = "Loss of a text in bits per byte: comparable between models with different tokenizers."
INPUTS = """
Args:
    nats (list of float): summed loss of each row of text, special tokens excluded.
    bytes (list of int): UTF-8 bytes of the tokens in those losses.
Returns:
    bits_per_byte: total nats / (ln 2 x total bytes); infinite if there are no bytes.
    standard_error: standard error of that ratio over rows; NaN with fewer than two rows.
    bytes: total bytes.
"""
CITATION = """\
@article{gao2020pile,
    title = {The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
    author = {Gao, Leo and Biderman, Stella and Black, Sid and others},
    journal = {arXiv preprint arXiv:2101.00027},
    year = {2020}
}"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class BitsPerByte(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"nats": datasets.Value("float64"), "bytes": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, nats: list[float], bytes: list[int]) -> dict[str, float]:
        n, total = len(bytes), sum(bytes)
        if total == 0:
            return {"bits_per_byte": math.inf, "standard_error": math.nan, "bytes": 0}
        ratio = sum(nats) / total
        squares = sum((row_nats - ratio * row_bytes) ** 2 for row_nats, row_bytes in zip(nats, bytes, strict=True))
        error = math.sqrt(squares * n / (n - 1)) / total if n > 1 else math.nan
        return {"bits_per_byte": ratio / math.log(2), "standard_error": error / math.log(2), "bytes": total}
