"""Accuracy of a model on a task: the record, a prediction per question, sample conversations."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.metrics.code_pass.estimate import pass_at_k
from evals.reporting.records import make_record

from .question import EvaluatedModel, Progress
from .task_files import NamedTask

SHOWN = 60  # characters of an answer in a note


@dataclass(frozen=True)
class TaskResult:
    """The records of a task, a row per answer, and the conversations if the model replied in words.

    The first record is the accuracy; with several samples per question, a second one is pass@samples.
    """

    records: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def evaluate_task(
    task: NamedTask, asked: EvaluatedModel, model_name: str, drawn: dict[str, Any], progress: Progress | None = None
) -> TaskResult:
    """Return the accuracy of the answers, with a note if different questions all got the same one.

    With several samples per question, the accuracy is the mean share of right samples, pass@1.

    Args:
        task: The questions, all of one class.
        asked: The model.
        model_name: Its name in the record.
        drawn: How the questions were drawn, for the record.
        progress: Called with the number of prompts just answered.
    """
    task.task.check_grading()
    answers = task.task.answer(task.questions, asked, progress)
    references = [question.reference for question in task.questions]
    right = [
        [sample == wanted for sample in given] for given, wanted in zip(answers.predictions, references, strict=True)
    ]
    chance = statistics.fmean(question.chance for question in task.questions)
    settings = {"kind": task.task.name} | drawn | {"baseline": round(chance, 4)} | answers.settings
    figures = {"accuracy": 1} | {f"pass@{k}": k for k in {len(samples) for samples in right} if k > 1}
    records = [
        make_record(task.name, metric, *pass_at_k(right, k), len(right), settings, model_name)
        for metric, k in figures.items()
    ]
    if note := same_answer(answers.shown, references):
        records[0]["note"] = note
    samples = [  # none if the task is not answered in words
        {"task": task.name, "correct": samples[0], "messages": messages}
        for messages, samples in zip(answers.conversations, right, strict=False)
    ]
    return TaskResult(records, prediction_rows(task.name, right, answers.texts), samples)


def prediction_rows(
    task: str, right: Sequence[Sequence[bool]], texts: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return the rows of `output_predictions`; `index` counts the evaluated questions in file order.

    Several samples of a question are rows with one index.
    """
    return [
        {"task": task, "index": index, "right": is_right, "reply": text}
        for index, samples in enumerate(zip(right, texts, strict=True))
        for is_right, text in zip(*samples, strict=True)
    ]


def same_answer(answers: Sequence[str], references: Sequence[str]) -> str | None:
    """Return a note if different questions all get the same answer, else None."""
    if len(set(answers)) > 1 or len(set(references)) < 2:
        return None
    answer = " ".join(answers[0].split())
    shown = repr(answer if len(answer) <= SHOWN else answer[:SHOWN] + "...") if answer else "none"
    return f"the same answer to all {len(answers)} questions: {shown}"
