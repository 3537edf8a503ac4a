"""Generative tasks: the model replies, with its python tool, and the reply is graded."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions

from . import gsm8k
from .formats import match_answers
from .task_files import Task

# Thai, Lao, Burmese, Khmer, kana and Chinese characters, which are written without spaces between words.
UNSPACED_RANGES = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED = re.compile(f"[{UNSPACED_RANGES}]")
SPACED = rf"[^\W{UNSPACED_RANGES}]"  # letters and digits of all other scripts


def generate_replies(
    engine: Engine,
    conversations: Sequence[list[dict]],
    options: SamplingOptions,
    *,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[list[dict]]:
    """Return the new messages of each conversation: the assistant's, and the results of its python calls.

    A conversation that does not fit the model's context gets no messages, and so is graded as wrong.
    `progress` is called with the number of completed replies, like `tqdm.update`.
    """
    prompts = [engine.codec.prompt(messages) for messages in conversations]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.context]
    replies: list[list[dict]] = [[] for _ in conversations]
    if progress is not None:
        progress(len(conversations) - len(fitting))
    fitting_prompts = [prompts[i] for i in fitting]
    new = engine.answer_prompts(fitting_prompts, options, max_new_tokens, seed, batch_size, progress)
    for index, messages in zip(fitting, new, strict=True):
        replies[index] = messages
    return replies


def predicted_answers(task: Task, replies: Sequence[Sequence[dict]]) -> list[str]:
    """Return the answer in each reply, "" if it has none; it is right if equal to that of `reference_answers`.

    Only the assistant's own text is considered, not its code or the tool's output.
    """
    extract = {"gsm8k": extract_number, "match": extract_match}[task.kind]
    return [extract(example, reply) for example, reply in zip(task.examples, replies, strict=True)]


def reference_answers(task: Task) -> list[str]:
    """Return the right answer to each example."""
    reference = {"gsm8k": lambda example: gsm8k.extract_answer(example["answer"]), "match": match_reference}[task.kind]
    return [reference(example) for example in task.examples]


def match_reference(example: dict[str, Any]) -> str:
    return ", ".join(match_answers(example))


def extract_number(example: dict[str, Any], reply: Sequence[dict]) -> str:
    return gsm8k.extract_answer(gsm8k.last_words(reply)) or ""


def extract_match(example: dict[str, Any], reply: Sequence[dict]) -> str:
    """Return the example's answer if `reply` has all of it as whole words and none of its rivals, else ""."""
    text = assistant_text(reply)
    has_answer = all(has_word(text, word) for word in match_answers(example))
    has_rival = any(has_word(text, rival) for rival in example["rivals"])
    return match_reference(example) if has_answer and not has_rival else ""


def assistant_text(reply: Sequence[dict]) -> str:
    """Return the assistant's own text, without its code and the tool's output."""
    return " ".join(message["content"] or "" for message in reply if message["role"] == "assistant")


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
