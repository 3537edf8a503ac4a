"""Questions answered in words: the model replies, with its python tool, and the reply is graded."""

import re
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from modeling_nanochat.engine import Engine

from . import gsm8k
from .tasks import Task


def generate_replies(
    engine: Engine,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    description: str = "replies",
) -> list[list[dict]]:
    """For each question the new messages, greedily decoded: assistant, and tool results where it called python.

    A question that does not fit the model's context has no messages as its reply, and so is answered wrongly.
    """
    conversations = [[{"role": "user", "content": question}] for question in questions]
    fitting = [i for i, messages in enumerate(conversations) if len(engine.codec.prompt(messages)) < engine.context]
    replies: list[list[dict]] = [[] for _ in questions]
    with tqdm(total=len(fitting), desc=description, unit="reply", leave=False, disable=len(fitting) < 2 or None) as bar:
        new = engine.generate_batch(
            [conversations[i] for i in fitting],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            seed=0,
            batch_size=batch_size,
            progress=bar.update,
        )
    for index, messages in zip(fitting, new, strict=True):
        replies[index] = messages
    return replies


def predicted_answers(task: Task, replies: Sequence[Sequence[dict]]) -> list[str]:
    """The answer that each reply gives, "" where it gives none; right if equal to the one of `reference_answers`.

    Only the assistant's own words are looked at, neither its code nor what the tool printed.
    """
    extract = {"gsm8k": extract_number, "match": extract_match}[task.kind]
    return [extract(example, reply) for example, reply in zip(task.examples, replies, strict=True)]


def reference_answers(task: Task) -> list[str]:
    return [gsm8k.extract_answer(e["answer"]) if task.kind == "gsm8k" else e["answer"] for e in task.examples]


def extract_number(example: dict[str, Any], reply: Sequence[dict]) -> str:
    return gsm8k.extract_answer(gsm8k.last_words(reply)) or ""


def extract_match(example: dict[str, Any], reply: Sequence[dict]) -> str:
    """The example's answer if `reply` has it as a whole word and has none of its rivals, else ""."""
    text = " ".join(message["content"] or "" for message in reply if message["role"] == "assistant")
    has_rival = any(has_word(text, rival) for rival in example["rivals"])
    return example["answer"] if has_word(text, example["answer"]) and not has_rival else ""


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` whole, upper and lower case told apart.

    No letter or digit is beside it, nor joined to it by one of `,.-`: "1" is not in "1.5", nor "l,a,p" in "c,l,a,p".
    """
    return re.search(rf"(?<!\w)(?<!\w[,.-]){re.escape(word)}(?!\w)(?![,.-]\w)", text) is not None
