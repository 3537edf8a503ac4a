"""Multiple choice as in CORE: {"query", "choices": [...], "gold": index, "continuation_delimiter"?}.

The delimiter is written between query and choice, a space by default.
"""

from typing import Any, Self

from .continuations import DELIMITER, ContinuationQuestion
from .fields import checked_choices, require_index, require_no_history, require_strings


class ClozeQuestion(ContinuationQuestion):
    """A text and its possible continuations."""

    name = "cloze"
    fields = frozenset({"query", "choices", "gold"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        record = {"continuation_delimiter": DELIMITER} | record
        require_strings(record, ("query", "continuation_delimiter"), where)
        require_no_history(record, where)
        choices = checked_choices(record["choices"], where)
        require_index(record["gold"], "gold", len(choices), where)
        return cls(record["query"] + record["continuation_delimiter"], choices, record["gold"])
