"""MMLU, exams in 57 subjects: {"question", "choices": [...], "answer": index}, often with "subject".

Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300; on the Hub: cais/mmlu.
"""

from typing import Any, Self

from .fields import checked_choices, require_index, require_no_history, require_strings
from .letters import LETTERS, LetterQuestion


class MmluQuestion(LetterQuestion):
    """A question whose choices get the letters A, B, C, ..."""

    name = "mmlu"
    fields = frozenset({"question", "choices", "answer"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        require_strings(record, ("question",), where)
        require_no_history(record, where)
        choices = checked_choices(record["choices"], where)
        require_index(record["answer"], "answer", len(choices), where)
        letters = LETTERS[: len(choices)]
        return cls(record["question"], choices, tuple(letters), letters[record["answer"]])
