"""Accuracy of a model on a task: the record, a prediction per question, sample conversations."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate

from evals.reporting.records import make_record

from .question import EvaluatedModel, Progress
from .task_files import NamedTask

METRIC = Path(__file__).parents[1] / "metrics" / "exact_accuracy"
SHOWN = 60  # characters of an answer in a note


@dataclass(frozen=True)
class TaskResult:
    """The record of a task, a prediction for each question, and the conversations if the model replied in words."""

    record: dict[str, Any]
    predictions: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def evaluate_task(
    task: NamedTask, asked: EvaluatedModel, model_name: str, drawn: dict[str, Any], progress: Progress | None = None
) -> TaskResult:
    """Return the accuracy of the answers, with a note if different questions all got the same one.

    Args:
        task: The questions, all of one class.
        asked: The model.
        model_name: Its name in the record.
        drawn: How the questions were drawn, for the record.
        progress: Called with the number of prompts just answered.
    """
    answers = task.task.answer(task.questions, asked, progress)
    references = [question.reference for question in task.questions]
    right = [given == wanted for given, wanted in zip(answers.predictions, references, strict=True)]
    chance = statistics.fmean(question.chance for question in task.questions)
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    figures = metric.compute(predictions=answers.predictions, references=references, baseline=chance)
    settings = {"kind": task.task.name} | drawn | {"baseline": round(chance, 4)} | answers.settings
    value, error, n = figures["accuracy"], figures["standard_error"], figures["n"]
    record = make_record(task.name, "accuracy", value, error, n, settings, model_name)
    note = same_answer(answers.shown, references)
    samples = [  # none if the task is not answered in words
        {"task": task.name, "correct": is_right, "messages": messages}
        for messages, is_right in zip(answers.conversations, right, strict=False)
    ]
    rows = prediction_rows(task.name, right, answers.texts)
    return TaskResult(record | ({"note": note} if note else {}), rows, samples)


def prediction_rows(task: str, right: Sequence[bool], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of `output_predictions`; `index` counts the evaluated questions in file order."""
    graded = enumerate(zip(right, texts, strict=True))
    return [{"task": task, "index": index, "right": is_right, "reply": text} for index, (is_right, text) in graded]


def same_answer(answers: Sequence[str], references: Sequence[str]) -> str | None:
    """Return a note if different questions all get the same answer, else None."""
    if len(set(answers)) > 1 or len(set(references)) < 2:
        return None
    answer = " ".join(answers[0].split())
    shown = repr(answer if len(answer) <= SHOWN else answer[:SHOWN] + "...") if answer else "none"
    return f"the same answer to all {len(answers)} questions: {shown}"
