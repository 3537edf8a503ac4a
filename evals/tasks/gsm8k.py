"""GSM8K, grade-school word problems: {"question", "answer", "history"?, "grading"?}.

The data marks each calculation as `<<12+7=19>>` and ends in `#### 19`; `history` is a list of messages that precede
the question. Answers are compared as numbers: `#### 19.0` is right. With `grading` "original" they are compared as
strings, as in nanochat, whose published figures are by that rule; plain whole numbers are graded the same by both.
Cobbe et al. 2021, https://arxiv.org/abs/2110.14168; on the Hub: openai/gsm8k.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

from evals.metrics.exact_answer.answers import Grading, extract_answer
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import call_message

from .fields import history, require_strings
from .question import Answers, EvaluatedModel, Progress
from .replies import ReplyQuestion, last_words

CALCULATION = re.compile(r"<<([^>]+)>>")
REFERENCE = re.compile(r"#### -?[0-9][0-9,]*(\.[0-9]+)?[ \t]*(\n|$)")  # the whole line, so that no number is cut


@dataclass(frozen=True)
class Gsm8kQuestion(ReplyQuestion):
    """A problem and its worked answer; a right reply ends in the same `#### n`."""

    worked: str
    grading: Grading = "number"

    name = "gsm8k"
    fields = frozenset({"question", "answer"})

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str) -> Self:
        require_strings(record, ("question", "answer"), where)
        before = history(record, where)
        worked, grading = record["answer"], record.get("grading", "number")
        if worked.count("####") != 1 or not REFERENCE.search(worked) or extract_answer(worked) is None:
            raise UserError(
                f"{where}: `answer` has no final '#### <number>' on a line of its own; add it, as in GSM8K"
            )
        if grading not in get_args(Grading):
            raise UserError(f"{where}: `grading` must be one of {', '.join(get_args(Grading))}, found {grading!r}")
        return cls(record["question"], before, worked, grading)

    @property
    def reference(self) -> str:
        return extract_answer(self.worked, self.grading) or ""

    def extract(self, reply: Sequence[dict]) -> str:
        return extract_answer(last_words(reply), self.grading) or ""

    def shown(self, reply: Sequence[dict]) -> str:
        return self.extract(reply)

    @classmethod
    def answer(cls, questions: Sequence[Self], asked: EvaluatedModel, progress: Progress | None = None) -> Answers:
        answers = super().answer(questions, asked, progress)
        return replace(answers, settings=answers.settings | {"grading": questions[0].grading})

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
