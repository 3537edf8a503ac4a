"""Evaluation tasks from data sets of questions; the task is told by the fields of the first record."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_records

from .question import Question
from .table import question_of


@dataclass(frozen=True)
class NamedTask:
    """Questions of one task, and the name they have in the results."""

    name: str
    questions: Sequence[Question]

    @property
    def task(self) -> type[Question]:
        return type(self.questions[0])


def parse_task_argument(argument: str) -> tuple[str, str]:
    """Return name and source of `name=source`; a bare path or Hub id is named after itself."""
    name, equals, source = argument.partition("=")
    if not equals:
        return Path(argument).stem, argument
    if not name or not source:
        raise UserError(f"eval_files: {argument!r} is not name=path; write for example facts=data/eval/facts.jsonl")
    return name, source


def load_task(name: str, source: str, max_examples: int | None = None, seed: int = 0) -> NamedTask:
    """Read and check the questions of a source.

    Args:
        name: Name of the task in the results.
        source: File, folder or Hub id, see `modeling_nanochat.text.records`.
        max_examples: Size of a random sample, because files are often sorted by subject; it keeps the file order.
        seed: Seed of the sample.

    Raises:
        UserError: The source is missing or empty, or a record is malformed or unlike the first; names the line.
    """
    questions: list[Question] = []
    for where, record in read_records([source], "eval_files"):
        question = question_of(record, where)
        if questions and type(question) is not type(questions[0]):
            raise UserError(
                f"{where}: a record of {question.name} among records of {questions[0].name}; split the file"
            )
        questions.append(question)
    if max_examples is not None and max_examples < len(questions):
        sample = sorted(random.Random(seed).sample(range(len(questions)), max_examples))
        questions = [questions[i] for i in sample]
    return NamedTask(name, questions)
