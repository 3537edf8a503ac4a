"""Prompts of CORE tasks: few-shot text, token ids, and which tokens are scored.

multiple_choice     one prompt per choice; scored from the first token where the prompts differ
schema              one prompt per context; scored on the common suffix of their tokens
language_modeling   one prompt; scored on the continuation

The choice of examples and every character of the prompts match the original, so that figures are comparable with
published ones.
"""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from evals.token_trees import Row, common_prefix, cropped
from modeling_nanochat.tokenization_nanochat import encode_documents

from .tasks import LANGUAGE_MODELING, MULTIPLE_CHOICE, CoreTask

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234  # plus the example's index


def drawn_examples(task: CoreTask, max_per_task: int = -1) -> list[dict[str, Any]]:
    """Return the evaluated examples in order: shuffled, then the first `max_per_task`; all if that is not positive."""
    examples = list(task.examples)
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task] if max_per_task > 0 else examples


def fewshot_indices(index: int, count: int, num_fewshot: int) -> list[int]:
    """Return which of the `count` examples precede example `index` in its prompt.

    They are sampled from the evaluated examples, not from the file: with another `max_per_task` an example gets other
    few-shot examples, so the figures of a quick run and of a full one differ by more than sampling error. That is the
    original's definition, kept so that figures are comparable with published ones. If there are fewer than
    `num_fewshot` others, all of them are used (the original fails).
    """
    others = [i for i in range(count) if i != index]
    return random.Random(FEWSHOT_SEED + index).sample(others, min(num_fewshot, len(others)))


def prompts_of(task: CoreTask, example: dict[str, Any], shots: Sequence[dict[str, Any]]) -> list[str]:
    """Return the prompts of an example, one per option; for language modelling one without and one with the answer."""
    before = "".join(solved(task, shot) + "\n\n" for shot in shots)
    if task.task_type != LANGUAGE_MODELING:
        return [before + text for text in options(task, example)]
    # A trailing space would be a separate token, but with the answer it is part of the next word's token.
    return [(before + context(task, example)).strip(), before + solved(task, example)]


def options(task: CoreTask, example: dict[str, Any]) -> list[str]:
    delimiter = task.continuation_delimiter
    if task.task_type == MULTIPLE_CHOICE:
        return [example["query"] + delimiter + choice for choice in example["choices"]]
    return [option + delimiter + example["continuation"] for option in example["context_options"]]


def context(task: CoreTask, example: dict[str, Any]) -> str:
    return example["context"].strip() + task.continuation_delimiter


def solved(task: CoreTask, example: dict[str, Any]) -> str:
    """Return the example with its right answer."""
    if task.task_type == LANGUAGE_MODELING:
        return context(task, example) + example["continuation"]
    return options(task, example)[example["gold"]]


def rows_of(task_type: str, encoded: Sequence[list[int]], max_length: int) -> list[Row]:
    """Return the rows to score, from the tokens of `prompts_of`: one per option, or one for language modelling.

    Args:
        encoded: Ids of each prompt, prefixed with bos.
        max_length: Longer prompts are cropped at the beginning.
    """
    if task_type == LANGUAGE_MODELING:
        prompt, full = encoded
        # If the answer's first character merged into the preceding token, the span starts with that token.
        return [cropped(full, common_prefix([prompt, full]), max_length)]
    if task_type == MULTIPLE_CHOICE:
        same = common_prefix(encoded)
        return [cropped(ids, same, max_length) for ids in encoded]
    same = common_prefix([ids[::-1] for ids in encoded])
    return [cropped(ids, len(ids) - same, max_length) for ids in encoded]


def block_rows(
    task: CoreTask,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[dict[str, Any]],
    indices: Sequence[int],
    max_length: int,
) -> list[list[Row]]:
    """Return the rows of each example in `indices`; all prompts are tokenized at once.

    Args:
        examples: All evaluated examples, from which few-shot examples are sampled; see `drawn_examples`.
    """
    prompts = []
    for index in indices:
        shots = [examples[i] for i in fewshot_indices(index, len(examples), task.num_fewshot)]
        prompts.append(prompts_of(task, examples[index], shots))
    encoded = iter(encode_documents(tokenizer, [prompt for group in prompts for prompt in group]))
    return [rows_of(task.task_type, [next(encoded) for _ in group], max_length) for group in prompts]
