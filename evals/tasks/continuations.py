"""Zero-shot multiple choice by continuation, scored like CORE's "mc" tasks: the choice with the lowest mean loss.

Needs no chat tokens, so it is the only kind of task file that a base model can be evaluated on.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.scoring import Scorer, context_of
from evals.token_trees import Row, common_prefix, cropped
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
        names = ["none" if choice is None else f"choice {choice + 1}" for choice in choices]
        predictions, texts = [[str(choice)] for choice in choices], [[name] for name in names]
        settings = {"shots": 0, "questions_not_finite": choices.count(None)}
        return Answers(predictions=predictions, texts=texts, shown=names, settings=settings)


def predict_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[ContinuationQuestion],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[int | None]:
    """Return for each question the index of the choice with the lowest mean loss (the first on ties).

    None if a loss is not finite, so that there is no lowest one.
    """
    prompts = [[question.query + choice for choice in question.choices] for question in questions]
    rows = [continuation_rows(tokenizer, of_question, context_of(model)) for of_question in prompts]
    return [lowest([score.loss for score in scores]) for scores in Scorer(model, batch_size).scores(rows, progress)]


def lowest(losses: Sequence[float]) -> int | None:
    return losses.index(min(losses)) if all(map(math.isfinite, losses)) else None


def continuation_rows(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_length: int = sys.maxsize
) -> list[Row]:
    """Return the token ids of each prompt, prefixed with bos, scored from the first position where they differ.

    Longer prompts than `max_length` are cropped at the beginning, as in CORE.
    """
    rows = encode_documents(tokenizer, prompts)
    # A choice that is a prefix of another would have no tokens to score; its last token is scored instead.
    start = min(common_prefix(rows), *(len(row) - 1 for row in rows))
    return [cropped(row, start, max_length) for row in rows]
