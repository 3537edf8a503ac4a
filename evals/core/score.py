"""CORE (DCLM, arXiv 2406.11794): the mean centered accuracy of a base model over in-context tasks.

    result = core(model, tokenizer, load_core("data/core"), max_per_task=500)
    result.core, result.tasks["copa"]["accuracy"]

A multiple-choice or schema example is right if the right option has the lowest mean loss per token, a continuation if
each token is the most likely one. Centered: 0 is guessing, 1 is perfect. Everything that affects the figure matches
the original (see `prompts`), with one exception: prompts are cropped to the model's context, as the original does only
for models other than its own. To exceed the training length, as its own models do, set a large `max_length`.

lm-eval scores these tasks too, but with other prompts and another choice of examples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.metrics.core.centered import binomial_error, centered, mean_centered
from evals.scoring import Scorer, context_of

from .grading import Grade, grade, notes_of
from .prompts import block_rows, drawn_examples
from .tasks import CoreTask, load_core

__all__ = ["CoreResult", "CoreTask", "core", "load_core"]

# Examples assigned to a process together. Batches are formed within a block, so they hold the same rows for any number
# of processes: rounding and ties between options do not depend on it.
EXAMPLES_PER_BLOCK = 32


@dataclass(frozen=True)
class CoreResult:
    """`core` with its standard error, and for each task label {"accuracy", "standard_error", "centered", "n"}.

    `right` says of each example whether it was right, in the order of `drawn_examples`, and `notes` what was unusual
    about some of them, by label.
    """

    core: float
    standard_error: float
    tasks: dict[str, dict[str, float]]
    right: dict[str, list[bool]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def core(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[CoreTask],
    *,
    max_per_task: int = -1,
    batch_size: int = 32,
    max_length: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> CoreResult:
    """Return CORE of `model`; the result does not depend on the number of processes.

    Args:
        model: A causal language model, not compiled: shapes change from batch to batch; its mode is restored.
        tokenizer: Its tokenizer, with a bos token.
        tasks: See `load_core`.
        max_per_task: Examples per task; all if not positive. Figures for different values are not comparable, see
            `prompts.fewshot_indices`.
        batch_size: Maximum number of examples in a forward pass, fewer if they are long; what their options share is
            computed once. 1 is the reference: every prompt is read whole and alone.
        max_length: Maximum tokens of a prompt, whose end is kept; the model's context if None, where it has one.
        process_index, num_processes: This process scores every `num_processes`-th block of examples. Under FSDP every
            rank must run the same forward passes: keep the defaults there.
        gather: Sums a tensor over all processes; required if there are several.

    Raises:
        ValueError: There are several processes but no `gather`.
    """
    if num_processes > 1 and gather is None:
        raise ValueError(f"{num_processes} processes need `gather`, which sums their grades")
    max_length = max_length or context_of(model)
    examples = [drawn_examples(task, max_per_task) for task in tasks]
    *starts, total = accumulate(map(len, examples), initial=0)
    grades = torch.zeros(total, dtype=torch.long)  # of all tasks, 0 for the examples of other processes
    blocks = list(blocks_of(list(map(len, examples))))[process_index::num_processes]
    was_training = model.training
    model.eval()
    try:
        scorer = Scorer(model, batch_size)
        for number, indices in with_progress_bar(blocks, tasks, quiet=process_index > 0):
            task, start = tasks[number], starts[number]
            rows = block_rows(task, tokenizer, examples[number], indices, max_length)
            for index, own, scores in zip(indices, rows, scorer.scores(rows), strict=True):
                grades[start + index] = grade(task, examples[number][index], own, scores)
    finally:
        model.train(was_training)
    grades = grades if gather is None else gather(grades.to(model.device))
    return result_of(tasks, [part.tolist() for part in grades.split(list(map(len, examples)))])


def blocks_of(sizes: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Yield pairs of a task's number and the indices of some of its examples, over all tasks."""
    for number, size in enumerate(sizes):
        for start in range(0, size, EXAMPLES_PER_BLOCK):
            yield number, range(start, min(start + EXAMPLES_PER_BLOCK, size))


def with_progress_bar(
    blocks: Sequence[tuple[int, range]], tasks: Sequence[CoreTask], quiet: bool
) -> Iterator[tuple[int, range]]:
    """Yield the blocks, with a progress bar that counts this process's examples and names the task."""
    total = sum(len(indices) for _, indices in blocks)
    with tqdm(total=total, desc="CORE", unit="example", leave=False, disable=quiet or None) as bar:
        for number, indices in blocks:
            bar.set_postfix_str(tasks[number].label, refresh=False)
            yield number, indices
            bar.update(len(indices))


def result_of(tasks: Sequence[CoreTask], grades: Sequence[Sequence[int]]) -> CoreResult:
    """Return the result from the grades of each task's examples."""
    right = {
        task.label: [bool(one & Grade.RIGHT) for one in of_task] for task, of_task in zip(tasks, grades, strict=True)
    }
    notes = {task.label: notes_of(of_task) for task, of_task in zip(tasks, grades, strict=True)}
    figures = combine(tasks, [[sum(of_task), len(of_task)] for of_task in right.values()])
    return replace(figures, right=right, notes={label: lines for label, lines in notes.items() if lines})


def combine(tasks: Sequence[CoreTask], counts: Sequence[Sequence[int]]) -> CoreResult:
    """Return the result from [right, all] of each task."""
    accuracies = [right / n for right, n in counts]
    errors = [binomial_error(accuracy, n) for accuracy, (_, n) in zip(accuracies, counts, strict=True)]
    figures = {
        task.label: {
            "accuracy": accuracy,
            "standard_error": error,
            "centered": centered(accuracy, task.baseline),
            "n": n,
        }
        for task, accuracy, error, (_, n) in zip(tasks, accuracies, errors, counts, strict=True)
    }
    return CoreResult(*mean_centered(accuracies, errors, [task.baseline for task in tasks]), figures)
