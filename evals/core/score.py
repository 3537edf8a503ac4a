"""CORE (DCLM, arXiv 2406.11794): the mean centered accuracy of a base model over in-context tasks.

    result = core(model, tokenizer, load_core("data/core"), max_per_task=500)
    result.core, result.tasks["copa"]["accuracy"]

A multiple-choice or schema example is right if the right option has the lowest mean loss per token, a continuation if
each token is the most likely one. Centered: 0 is guessing, 1 is perfect. Everything that affects the figure matches
the original (see `prompts`), with one exception: prompts are cropped to the model's context, as the original does only
for models other than its own. To exceed the training length, as its own models do, set a large `max_length`.

lm-eval scores these tasks too, but with other prompts and another choice of examples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.batching import MAX_LOGITS, batches_by_length
from evals.metrics.core.centered import binomial_error, centered, mean_centered

from .prompts import Row, block_rows, drawn_examples
from .tasks import LANGUAGE_MODELING, CoreTask, load_core

__all__ = ["CoreResult", "CoreTask", "core", "load_core"]

# Examples assigned to a process together. Batches are formed within a block, so they hold the same rows for any number
# of processes: rounding and ties between options do not depend on it.
EXAMPLES_PER_BLOCK = 32


@dataclass(frozen=True)
class CoreResult:
    """`core` with its standard error, and for each task label {"accuracy", "standard_error", "centered", "n"}."""

    core: float
    standard_error: float
    tasks: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Score:
    """Mean loss in nats of a row's scored tokens, and the most likely token at each of them."""

    loss: float
    predicted: list[int]


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
        batch_size: Maximum number of prompts in a forward pass; fewer if they are long.
        max_length: Maximum tokens of a prompt, whose end is kept; the model's context if None.
        process_index, num_processes: This process scores every `num_processes`-th block of examples. Under FSDP every
            rank must run the same forward passes: keep the defaults there.
        gather: Sums a tensor over all processes; required if there are several.

    Raises:
        ValueError: There are several processes but no `gather`.
    """
    if num_processes > 1 and gather is None:
        raise ValueError(f"{num_processes} processes need `gather`, which sums their counts")
    max_length = max_length or model.config.max_position_embeddings
    examples = [drawn_examples(task, max_per_task) for task in tasks]
    blocks = list(blocks_of([len(drawn) for drawn in examples]))[process_index::num_processes]
    counts = torch.zeros(len(tasks), 2, dtype=torch.long)  # right, all
    was_training = model.training
    model.eval()
    try:
        for number, indices in with_progress_bar(blocks, tasks, quiet=process_index > 0):
            rows = block_rows(tasks[number], tokenizer, examples[number], indices, max_length)
            right = count_right(model, tasks[number], [examples[number][i] for i in indices], rows, batch_size)
            counts[number] += torch.tensor([right, len(indices)])
    finally:
        model.train(was_training)
    counts = counts if gather is None else gather(counts.to(model.device))
    return combine(tasks, counts.tolist())


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


def count_right(
    model: PreTrainedModel,
    task: CoreTask,
    examples: Sequence[dict[str, Any]],
    rows: Sequence[list[Row]],
    batch_size: int,
) -> int:
    scores = iter(score_rows(model, [row for group in rows for row in group], batch_size))
    return sum(
        is_right(task, example, group, [next(scores) for _ in group])
        for example, group in zip(examples, rows, strict=True)
    )


def is_right(task: CoreTask, example: dict[str, Any], rows: Sequence[Row], scores: Sequence[Score]) -> bool:
    if task.task_type == LANGUAGE_MODELING:
        return scores[0].predicted == rows[0].target
    return chosen(scores) == example["gold"]


def chosen(scores: Sequence[Score]) -> int:
    """Return the option with the lowest loss, the first on ties.

    An option that is a prefix of another has no token to score, and its loss is NaN. As in the original it is chosen
    only if it is the first, because comparisons with NaN are false; published tasks have no such option.
    """
    losses = [score.loss for score in scores]
    return losses.index(min(losses))


def score_rows(model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Score]:
    """Return the score of each row; rows of similar length are batched together."""
    scores: list[Score] = [Score(math.nan, [])] * len(rows)
    for batch in batches_by_length([len(row.ids) for row in rows], batch_size):
        for part in within_memory(batch, rows, model.config.vocab_size):
            for index, score in zip(part, score_batch(model, [rows[i] for i in part]), strict=True):
                scores[index] = score
    return scores


def within_memory(batch: list[int], rows: Sequence[Row], vocab_size: int) -> list[list[int]]:
    """Return the batch, halved until the logits of each part fit into MAX_LOGITS or it is a single row."""
    kept = len(predicting([rows[i] for i in batch]))
    if len(batch) == 1 or len(batch) * kept * vocab_size <= MAX_LOGITS:
        return [batch]
    half = len(batch) // 2
    return within_memory(batch[:half], rows, vocab_size) + within_memory(batch[half:], rows, vocab_size)


def predicting(rows: Sequence[Row]) -> list[int]:
    """Return the sorted positions whose logits predict a scored token of any row: p predicts token p + 1."""
    return sorted({position - 1 for row in rows for position in range(row.start, len(row.ids))})


@torch.no_grad()
def score_batch(model: PreTrainedModel, rows: Sequence[Row]) -> list[Score]:
    """Score rows in one forward pass. Padding is on the right, where causal attention hides it from scored tokens."""
    kept, device = predicting(rows), model.device
    if not kept:
        return [Score(math.nan, []) for _ in rows]
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(device)
    logits = model(input_ids=ids, logits_to_keep=torch.tensor(kept, device=device), use_cache=False).logits
    losses, predicted = [], []
    for row, row_ids, row_logits in zip(rows, ids, logits, strict=True):  # by row, to avoid a float32 copy of all
        first = kept.index(row.start - 1) if row.target else 0
        scored = row_logits[first : first + len(row.target)].float()
        losses.append(F.cross_entropy(scored, row_ids[row.start : len(row.ids)]))  # NaN where nothing is scored
        predicted.append(scored.argmax(-1))
    tokens = iter(torch.cat(predicted).tolist())
    values = torch.stack(losses).tolist()
    return [Score(loss, [next(tokens) for _ in row.target]) for loss, row in zip(values, rows, strict=True)]


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
