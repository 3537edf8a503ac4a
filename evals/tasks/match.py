"""Questions answered in words: {"question", "answer", "rivals": [...], "history"?}.

A reply is right if it has `answer` as whole words and none of `rivals`. `answer` may be a list of strings, all of
which must occur. `history` is a list of messages that precede the question.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from modeling_nanochat.errors import UserError

from .fields import history, is_list_of_strings, require_strings
from .replies import ReplyQuestion, assistant_text

# Thai, Lao, Burmese, Khmer, kana and Chinese characters, which are written without spaces between words.
UNSPACED_RANGES = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED = re.compile(f"[{UNSPACED_RANGES}]")
SPACED = rf"[^\W{UNSPACED_RANGES}]"  # letters and digits of all other scripts


@dataclass(frozen=True)
class MatchQuestion(ReplyQuestion):
    """A question, the strings that a right reply contains, and those that it must not contain."""

    answers: tuple[str, ...]
    rivals: tuple[str, ...]

    name = "match"
    fields = frozenset({"question", "answer", "rivals"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        require_strings(record, ("question",), where)
        before = history(record, where)
        answers = [record["answer"]] if isinstance(record["answer"], str) else record["answer"]
        for field, words in (("answer", answers), ("rivals", record["rivals"])):
            if not is_list_of_strings(words) or not all(word.strip() for word in words):
                kind = "a string or a list" if field == "answer" else "a list"
                raise UserError(f"{where}: `{field}` must be {kind} of strings, none of them empty")
        if not answers:
            raise UserError(f"{where}: `answer` is empty; give at least one word that a right reply contains")
        return cls(record["question"], before, tuple(answers), tuple(record["rivals"]))

    @property
    def reference(self) -> str:
        return ", ".join(self.answers)

    def extract(self, reply: Sequence[dict]) -> str:
        text = assistant_text(reply)
        has_answer = all(has_word(text, word) for word in self.answers)
        has_rival = any(has_word(text, rival) for rival in self.rivals)
        return self.reference if has_answer and not has_rival else ""


def has_word(text: str, word: str) -> bool:
    """Return whether `text` contains `word` as a whole word; case matters.

    No letter or digit may be adjacent to it or joined to it by one of `,.-`: "1" is not in "1.5", nor "l,a,p" in
    "c,l,a,p". Characters of scripts without spaces between words do not count as adjacent, nor do letters adjacent to
    them: "12" and "苹果" are in "他有12个苹果"; but "学,校" is not in "小,学,校".
    """
    if word not in text:  # most texts; compiling the pattern is slow
        return False
    before = "" if UNSPACED.match(word[0]) else rf"(?<!{SPACED})"
    after = "" if UNSPACED.match(word[-1]) else rf"(?!{SPACED})"
    return re.search(rf"{before}(?<!\w[,.-]){re.escape(word)}{after}(?![,.-]\w)", text) is not None
