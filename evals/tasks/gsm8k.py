"""GSM8K, grade-school word problems: {"question", "answer", "history"?}, graded as in nanochat.

The data marks each calculation as `<<12+7=19>>` and ends in `#### 19`; `history` is a list of messages that precede
the question. Cobbe et al. 2021, https://arxiv.org/abs/2110.14168; on the Hub: openai/gsm8k.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import call_message

from .fields import history, require_strings
from .replies import ReplyQuestion, last_words

CALCULATION = re.compile(r"<<([^>]+)>>")
FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
REFERENCE = re.compile(r"#### -?[0-9][0-9,]*(\.[0-9]+)?[ \t]*(\n|$)")  # the whole line, so that no number is cut


@dataclass(frozen=True)
class Gsm8kQuestion(ReplyQuestion):
    """A problem and its worked answer; a right reply ends in the same `#### n`, compared as a string."""

    worked: str

    name = "gsm8k"
    fields = frozenset({"question", "answer"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        require_strings(record, ("question", "answer"), where)
        before = history(record, where)
        final = FINAL_ANSWER.search(record["answer"])
        if final is None or not REFERENCE.match(record["answer"], final.start()):
            raise UserError(
                f"{where}: `answer` has no final '#### <number>' on a line of its own; add it, as in GSM8K"
            )
        return cls(record["question"], before, record["answer"])

    @property
    def reference(self) -> str:
        return extract_answer(self.worked) or ""

    def extract(self, reply: Sequence[dict]) -> str:
        return extract_answer(last_words(reply)) or ""

    def shown(self, reply: Sequence[dict]) -> str:
        return self.extract(reply)

    def conversation(self) -> list[dict]:
        return [*self.history, *to_messages(self.question, self.worked)]


def to_messages(question: str, answer: str) -> list[dict]:
    """Return the worked answer as a conversation: user, then alternating assistant and tool messages, then assistant.

    `12 + 7 = <<12+7=19>>19 apples.` becomes assistant("12 + 7 = ", call "12+7"), tool("19"), assistant("19 apples.").
    A mark is split at its last "="; without "=", its result is empty. The result stays in the text that follows.
    """
    messages = [{"role": "user", "content": question}]
    *pieces, rest = CALCULATION.split(answer)
    for text, mark in zip(pieces[::2], pieces[1::2], strict=True):
        code, equals, result = mark.rpartition("=")
        messages.append(call_message(text, code if equals else result))
        messages.append({"role": "tool", "name": "python", "content": result if equals else ""})
    return messages + [{"role": "assistant", "content": rest}]


def extract_answer(text: str) -> str | None:
    """Return the number after the first `#### ` (exactly one space), commas removed; None if there is none.

    The comparison is between strings, as in nanochat: "17." is not "17".
    """
    match = FINAL_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None
