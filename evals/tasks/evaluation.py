"""Accuracy of a model on a task: the record, a prediction per question, sample conversations."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evals.harness.processes import ALONE, Processes
from evals.metrics.code_pass.estimate import pass_at_k
from evals.reporting.records import make_record

from .question import Answers, EvaluatedModel, Progress, Question
from .replies import ReplyQuestion
from .task_files import NamedTask

SHOWN = 60  # characters of an answer in a note
COUNTED = "questions_"  # settings of answers whose names begin so are counts
NOT_FINITE = "questions_not_finite"


@dataclass(frozen=True)
class TaskResult:
    """The records of a task, a row per answer, and the conversations if the model replied in words.

    The first record is the accuracy; with several samples per question, a second one is pass@samples.
    """

    records: list[dict[str, Any]]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def evaluate_task(
    task: NamedTask,
    asked: EvaluatedModel,
    model_name: str,
    drawn: dict[str, Any],
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> TaskResult:
    """Return the accuracy of the answers, with a note if different questions all got the same one.

    With several samples per question, the accuracy is the mean share of right samples, pass@1. The result does not
    depend on the number of processes.

    Args:
        task: The questions, all of one class.
        asked: The model.
        model_name: Its name in the record.
        drawn: How the questions were drawn, for the record.
        progress: Called with the number of prompts that this process has just answered.
        processes: Those that share the questions; all of them call this function and get the result.
    """
    task.task.check_grading()
    blocks = processes.share(question_blocks(task, asked))
    given = [task.task.answer(block, replace(asked, first=first), progress) for first, block in blocks]
    answers = joined(processes.gather(given))
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
    if notes := [note for note in (not_finite(answers), same_answer(answers.shown, references)) if note]:
        records[0]["note"] = "; ".join(notes)
    samples = [  # none if the task is not answered in words
        {"task": task.name, "correct": samples[0], "messages": messages}
        for messages, samples in zip(answers.conversations, right, strict=False)
    ]
    return TaskResult(records, prediction_rows(task.name, right, answers.texts), samples)


def question_blocks(task: NamedTask, asked: EvaluatedModel) -> list[tuple[int, Sequence[Question]]]:
    """Return the questions in blocks that a process answers together, each after the number of its first one.

    Batches are formed within a block, so they hold the same rows for any number of processes, and rounding does not
    depend on it. A block is two batches: one would leave the batch half empty while its last replies are generated.
    """
    size = max(1, 2 * asked.batch_size // asked.samples)
    return [(start, task.questions[start : start + size]) for start in range(0, len(task.questions), size)]


def own_prompts(task: NamedTask, asked: EvaluatedModel, processes: Processes = ALONE) -> int:
    """Return how many prompts of the task this process answers."""
    samples = asked.samples if issubclass(task.task, ReplyQuestion) else 1
    blocks = processes.share(question_blocks(task, asked))
    return samples * sum(question.prompts for _, block in blocks for question in block)


def joined(parts: Sequence[Answers]) -> Answers:
    """Return the answers to several blocks as one, with the sums of what their settings count."""
    settings = dict(parts[0].settings)
    for key in settings:
        if key.startswith(COUNTED):
            settings[key] = sum(part.settings[key] for part in parts)
    return Answers(
        predictions=[given for part in parts for given in part.predictions],
        texts=[given for part in parts for given in part.texts],
        shown=[answer for part in parts for answer in part.shown],
        conversations=[messages for part in parts for messages in part.conversations],
        settings=settings,
    )


def prediction_rows(
    task: str, right: Sequence[Sequence[bool]], texts: Sequence[Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of `output_predictions`; `index` counts the evaluated questions in their order.

    Several samples of a question are rows with one index. Without texts, no replies are kept.
    """
    texts = [[""] * len(samples) for samples in right] if texts is None else texts
    return [
        {"task": task, "index": index, "right": is_right, "reply": text}
        for index, samples in enumerate(zip(right, texts, strict=True))
        for is_right, text in zip(*samples, strict=True)
    ]


def not_finite(answers: Answers) -> str | None:
    """Return a note if the model computed no number for some answers, else None."""
    count = answers.settings.get(NOT_FINITE)
    return f"{count} of {len(answers.shown)} questions: logits not finite, counted as wrong" if count else None


def same_answer(answers: Sequence[str], references: Sequence[str]) -> str | None:
    """Return a note if different questions all get the same answer, else None."""
    if len(set(answers)) > 1 or len(set(references)) < 2:
        return None
    answer = " ".join(answers[0].split())
    shown = repr(answer if len(answer) <= SHOWN else answer[:SHOWN] + "...") if answer else "none"
    return f"the same answer to all {len(answers)} questions: {shown}"
