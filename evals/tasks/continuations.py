"""Zero-shot multiple choice by continuation, scored like CORE's "mc" tasks: the choice with the lowest mean loss.

Needs no chat tokens, so it is the only kind of task file that a base model can be evaluated on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.batching import batches_by_length, with_progress
from modeling_nanochat.tokenization_nanochat import encode_documents

from .question import Answers, EvaluatedModel, Progress, Question

DELIMITER = " "  # between query and choice, unless the record has another


@dataclass(frozen=True)
class ContinuationQuestion(Question):
    """A text, its possible continuations, and the index of the right one."""

    query: str  # including the delimiter before the choices
    choices: tuple[str, ...]
    gold: int

    needs_chat = False

    @property
    def reference(self) -> str:
        return str(self.gold)

    @property
    def prompts(self) -> int:
        return len(self.choices)

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)

    @classmethod
    def answer(cls, questions: Sequence[Self], asked: EvaluatedModel, progress: Progress | None = None) -> Answers:
        choices = predict_choices(asked.model, asked.tokenizer, questions, asked.batch_size, progress)
        names = [f"choice {choice + 1}" for choice in choices]
        predictions, texts = [[str(choice)] for choice in choices], [[name] for name in names]
        return Answers(predictions=predictions, texts=texts, shown=names, settings={"shots": 0})


def predict_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[ContinuationQuestion],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[int]:
    """Return for each question the index of the choice with the lowest mean loss (the first on ties)."""
    rows, owners = [], []
    for index, question in enumerate(questions):
        rows += continuation_rows(tokenizer, [question.query + choice for choice in question.choices])
        owners += [index] * len(question.choices)
    losses: list[list[float]] = [[] for _ in questions]
    for owner, loss in zip(owners, mean_losses(model, rows, batch_size, progress), strict=True):
        losses[owner].append(loss)
    return [scores.index(min(scores)) for scores in losses]


def continuation_rows(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[tuple[list[int], int]]:
    """Return the token ids of each prompt, prefixed with bos, and the first position where the prompts differ."""
    rows = encode_documents(tokenizer, prompts)
    shortest = min(map(len, rows))
    same = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    # A choice that is a prefix of another would have no tokens to score; its last token is scored instead.
    return [(row, min(same, shortest - 1)) for row in rows]


def mean_losses(
    model: PreTrainedModel,
    rows: Sequence[tuple[Sequence[int], int]],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[float]:
    """Return the mean loss in nats over the tokens from `start` on, for each row (ids, start)."""
    losses = [0.0] * len(rows)
    for batch in with_progress(batches_by_length([len(ids) for ids, _ in rows], batch_size), progress):
        for index, loss in zip(batch, batch_mean_losses(model, [rows[i] for i in batch]), strict=True):
            losses[index] = loss
    return losses


@torch.no_grad()
def batch_mean_losses(model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    first = min(start for _, start in rows)
    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    labels = pad_sequence(
        [torch.tensor([-100] * start + list(ids[start:])) for ids, start in rows], batch_first=True, padding_value=-100
    )[:, first:].to(model.device)
    kept = torch.arange(first - 1, ids.shape[1] - 1, device=model.device)  # position p predicts token p + 1
    logits = model(input_ids=ids.to(model.device), logits_to_keep=kept, use_cache=False).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()
