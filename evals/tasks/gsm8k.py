"""GSM8K word problems: reference answers as conversations with python calls, and nanochat's grading of replies.

The data marks each calculation as `<<12+7=19>>` and ends in `#### 19` (https://github.com/openai/grade-school-math).
"""

import re
from collections.abc import Sequence

from modeling_nanochat.text.conversations import call_message

CALCULATION = re.compile(r"<<([^>]+)>>")
FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


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
    """Return the number after the first `#### ` (exactly one space), commas removed; None if there is none."""
    match = FINAL_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def is_correct(reply: str, reference: str) -> bool:
    """Return whether both texts have the same `#### n`, compared as strings, as in nanochat: "17." is not "17"."""
    expected = extract_answer(reference)
    return expected is not None and extract_answer(reply) == expected


def last_words(reply: Sequence[dict]) -> str:
    """Return the assistant's last text; empty if its turn is unfinished.

    The tool's output does not count, otherwise printing an answer would be enough.
    """
    last = reply[-1] if reply else {}
    return (last.get("content") or "") if last.get("role") == "assistant" else ""
