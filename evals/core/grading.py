"""Grades of CORE's examples: right or wrong, and what was unusual about them."""

from collections.abc import Sequence
from enum import IntFlag
from typing import Any

from evals.scoring import Score
from evals.token_trees import Row
from modeling_nanochat.tokenization_nanochat import whole_messages

from .tasks import LANGUAGE_MODELING, CoreTask


class Grade(IntFlag):
    """The grade of an example. Only RIGHT counts for accuracies; the others are for notes."""

    RIGHT = 1
    NOT_FINITE = 2  # a loss is NaN or infinite, so nothing can be said about the model: never right
    NOTHING_SCORED = 4  # an option is the beginning of all others, or was cropped, so no token of it is scored
    HALF_CHARACTER = 8  # its text has an unpaired surrogate, read as U+FFFD


NOTES = {
    Grade.NOT_FINITE: "a loss that is not finite, counted as wrong",
    Grade.NOTHING_SCORED: "an option without tokens of its own, which is never right",
    Grade.HALF_CHARACTER: "an unpaired surrogate in the text, read as U+FFFD",
}


def grade(task: CoreTask, example: dict[str, Any], rows: Sequence[Row], scores: Sequence[Score]) -> Grade:
    """Return the grade of an example from the scores of its rows, one per option."""
    found = Grade(0)
    if any(row.target and not score.is_finite for row, score in zip(rows, scores, strict=True)):
        found |= Grade.NOT_FINITE
    if not all(row.target for row in rows):
        found |= Grade.NOTHING_SCORED
    if whole_messages(example) != example:
        found |= Grade.HALF_CHARACTER
    return found | Grade.RIGHT if is_right(task, example, rows, scores) and not found & Grade.NOT_FINITE else found


def is_right(task: CoreTask, example: dict[str, Any], rows: Sequence[Row], scores: Sequence[Score]) -> bool:
    if task.task_type == LANGUAGE_MODELING:
        return bool(rows[0].target) and scores[0].predicted == rows[0].target
    choice = chosen(scores)
    return choice == example["gold"] and bool(rows[choice].target)


def chosen(scores: Sequence[Score]) -> int:
    """Return the option with the lowest loss, the first on ties.

    An option without tokens of its own has no loss: NaN. As in the original it is chosen only if it is the first,
    because comparisons with NaN are false; published tasks have no such option.
    """
    losses = [score.loss for score in scores]
    return losses.index(min(losses))


def notes_of(grades: Sequence[int]) -> list[str]:
    """Return a line for each kind of unusual example, with their number."""
    counts = {flag: sum(bool(grade & flag) for grade in grades) for flag in NOTES}
    return [f"{counts[flag]} of {len(grades)} examples: {text}" for flag, text in NOTES.items() if counts[flag]]
