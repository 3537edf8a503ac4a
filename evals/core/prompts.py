"""What the model reads in a CORE task: few-shot prompts, their tokens, and which of them are scored.

multiple_choice     one prompt per choice; scored from where the prompts' tokens first differ
schema              one prompt per context; scored is what their tokens have in common at the end
language_modeling   one prompt; scored is the continuation

Which examples are drawn, and every character of the prompts, is the original's, so that figures compare with published
ones.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from modeling_nanochat.tokenization_nanochat import encode_documents

from .tasks import LANGUAGE_MODELING, MULTIPLE_CHOICE, CoreTask

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234  # plus the index of the example


@dataclass(frozen=True)
class Row:
    """A tokenized prompt; tokens from `start` on are scored, so `start` is at least 1."""

    ids: list[int]
    start: int

    @property
    def target(self) -> list[int]:
        return self.ids[self.start :]


def drawn_examples(task: CoreTask, max_per_task: int = -1) -> list[dict[str, Any]]:
    """The examples that are asked, in order: shuffled, then the first `max_per_task`; all if that is not positive."""
    examples = list(task.examples)
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task] if max_per_task > 0 else examples


def fewshot_indices(index: int, count: int, num_fewshot: int) -> list[int]:
    """Which of the `count` examples stand before example `index`.

    They come from the examples that are asked, not from the whole file: with another `max_per_task` an example has
    others before it, so the figures of a quick run and of a full one differ by more than their samples. That is the
    original's definition, kept so that figures compare with those published. Where there are fewer than `num_fewshot`
    others, all of them are used (the original fails).
    """
    others = [i for i in range(count) if i != index]
    return random.Random(FEWSHOT_SEED + index).sample(others, min(num_fewshot, len(others)))


def prompts_of(task: CoreTask, example: dict[str, Any], shots: Sequence[dict[str, Any]]) -> list[str]:
    """The prompts of an example, one per option; for language modelling one without and one with the answer."""
    before = "".join(solved(task, shot) + "\n\n" for shot in shots)
    if task.task_type != LANGUAGE_MODELING:
        return [before + text for text in options(task, example)]
    # A blank at the end would be a token of its own, where the tokens of the whole have it joined to the next word.
    return [(before + context(task, example)).strip(), before + solved(task, example)]


def options(task: CoreTask, example: dict[str, Any]) -> list[str]:
    delimiter = task.continuation_delimiter
    if task.task_type == MULTIPLE_CHOICE:
        return [example["query"] + delimiter + choice for choice in example["choices"]]
    return [option + delimiter + example["continuation"] for option in example["context_options"]]


def context(task: CoreTask, example: dict[str, Any]) -> str:
    return example["context"].strip() + task.continuation_delimiter


def solved(task: CoreTask, example: dict[str, Any]) -> str:
    """The example with its right answer."""
    if task.task_type == LANGUAGE_MODELING:
        return context(task, example) + example["continuation"]
    return options(task, example)[example["gold"]]


def rows_of(task_type: str, encoded: Sequence[list[int]], max_length: int) -> list[Row]:
    """Rows to be scored, from the tokens of `prompts_of`: one per option, or for language modelling a single one.

    Args:
        encoded: Ids of each prompt, bos in front.
        max_length: Longer prompts lose what they have too much at their beginning.
    """
    if task_type == LANGUAGE_MODELING:
        without, whole = encoded
        # Where the answer's first character joined the last token before it, the span starts with that token.
        return [cropped(whole, common_prefix([without, whole]), max_length)]
    if task_type == MULTIPLE_CHOICE:
        same = common_prefix(encoded)
        return [cropped(ids, same, max_length) for ids in encoded]
    same = common_prefix([ids[::-1] for ids in encoded])
    return [cropped(ids, len(ids) - same, max_length) for ids in encoded]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def cropped(ids: list[int], start: int, max_length: int) -> Row:
    surplus = max(0, len(ids) - max_length)
    return Row(ids[surplus:], max(1, start - surplus))  # nothing predicts the first token


def block_rows(
    task: CoreTask, tokenizer, examples: Sequence[dict[str, Any]], indices: Sequence[int], max_length: int
) -> list[list[Row]]:
    """The rows of each example of `indices`, all prompts tokenized at once.

    Args:
        examples: All that are asked, of which the few-shot examples are drawn; see `drawn_examples`.
    """
    prompts = []
    for index in indices:
        shots = [examples[i] for i in fewshot_indices(index, len(examples), task.num_fewshot)]
        prompts.append(prompts_of(task, examples[index], shots))
    encoded = iter(encode_documents(tokenizer, [prompt for of_one in prompts for prompt in of_one]))
    return [rows_of(task.task_type, [next(encoded) for _ in of_one], max_length) for of_one in prompts]
