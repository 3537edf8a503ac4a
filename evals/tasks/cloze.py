"""Zero-shot multiple choice by continuation, scored like CORE's "mc" tasks: the choice with the lowest mean loss.

Needs no chat tokens, so it is the only kind of task file that a base model can be evaluated on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from evals.batching import batches_by_length, with_progress
from modeling_nanochat.tokenization_nanochat import encode_documents

DELIMITER = " "  # between query and choice, unless the record has another


def predict_choices(
    model, tokenizer, examples: Sequence[dict], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
) -> list[int]:
    """Return for each {"query", "choices", ...} the index of the choice with the lowest mean loss (the first on ties).

    `progress` is called with the number of choices scored, like `tqdm.update`.
    """
    rows, owners = [], []
    for index, example in enumerate(examples):
        query = example["query"] + example.get("continuation_delimiter", DELIMITER)
        prompts = [query + choice for choice in example["choices"]]
        rows += continuation_rows(tokenizer, prompts)
        owners += [index] * len(prompts)
    losses: list[list[float]] = [[] for _ in examples]
    for owner, loss in zip(owners, mean_losses(model, rows, batch_size, progress), strict=True):
        losses[owner].append(loss)
    return [scores.index(min(scores)) for scores in losses]


def continuation_rows(tokenizer, prompts: Sequence[str]) -> list[tuple[list[int], int]]:
    """Return the token ids of each prompt, prefixed with bos, and the first position where the prompts differ."""
    rows = encode_documents(tokenizer, prompts)
    shortest = min(map(len, rows))
    same = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    # A choice that is a prefix of another would have no tokens to score; its last token is scored instead.
    return [(row, min(same, shortest - 1)) for row in rows]


def mean_losses(
    model,
    rows: Sequence[tuple[Sequence[int], int]],
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[float]:
    """Return the mean loss in nats over the tokens from `start` on, for each row (ids, start)."""
    losses = [0.0] * len(rows)
    for batch in with_progress(batches_by_length([len(ids) for ids, _ in rows], batch_size), progress):
        for index, loss in zip(batch, batch_mean_losses(model, [rows[i] for i in batch]), strict=True):
            losses[index] = loss
    return losses


@torch.no_grad()
def batch_mean_losses(model, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    first = min(start for _, start in rows)
    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    labels = pad_sequence(
        [torch.tensor([-100] * start + list(ids[start:])) for ids, start in rows], batch_first=True, padding_value=-100
    )[:, first:].to(model.device)
    kept = torch.arange(first - 1, ids.shape[1] - 1, device=model.device)  # position p predicts token p + 1
    logits = model(input_ids=ids.to(model.device), logits_to_keep=kept, use_cache=False).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()
