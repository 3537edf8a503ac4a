"""ARC, grade-school science: {"question", "choices": {"text": [...], "label": [...]}, "answerKey"}.

Clark et al. 2018, https://arxiv.org/abs/1803.05457; on the Hub: allenai/ai2_arc.
"""

from typing import Any, Self

from modeling_nanochat.errors import UserError

from .fields import checked_choices, is_list_of_strings, require_no_history, require_strings
from .letters import LetterQuestion


class ArcQuestion(LetterQuestion):
    """A question whose record gives a letter or digit to each choice."""

    name = "arc"
    fields = frozenset({"question", "choices", "answerKey"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        require_strings(record, ("question",), where)
        require_no_history(record, where)
        texts_and_labels = record["choices"] if isinstance(record["choices"], dict) else {}
        choices = checked_choices(texts_and_labels.get("text"), where)
        letters, answer = texts_and_labels.get("label", []), record["answerKey"]
        if not is_list_of_strings(letters) or len(letters) != len(choices) or answer not in letters:
            raise UserError(
                f"{where}: `choices` needs one `label` per `text`, and `answerKey` must be one of the labels"
            )
        return cls(record["question"], choices, tuple(letters), answer)
