"""Evaluation tasks from data sets of questions; the task is told by the fields of the first record."""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from evals.harness.downloads import downloaded
from evals.harness.published import PUBLISHED, SPELLING_BEE
from evals.metrics.exact_answer.answers import Grading
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_records

from .question import Question
from .spelling_bee import SpellingBee, read_words
from .table import question_of

WORDS = "words.txt"
SPELLING_BEE_QUESTIONS = 256  # as in the original's evaluation


@dataclass(frozen=True)
class NamedTask:
    """Questions of one task, and the name they have in the results."""

    name: str
    questions: Sequence[Question]

    @property
    def task(self) -> type[Question]:
        return type(self.questions[0])


def load_task(
    name: str, source: str | None, max_examples: int | None = None, seed: int = 0, grading: Grading = "number"
) -> NamedTask:
    """Read and check the questions of a source.

    Args:
        name: Name of the task in the results.
        source: File, folder or Hub id, see `modeling_nanochat.text.records`, of `spelling_bee` the words that it is
            generated from; None: the published source of that name.
        max_examples: Size of a random sample, because files are often sorted by subject; it keeps the file order.
        seed: Seed of the sample.
        grading: How answers are compared after `#### `, unless a record says so itself.

    Raises:
        UserError: The source is missing or empty, a record is malformed or unlike the first, or the records are of
            another kind than the published task of that name; names the line.
    """
    questions = spelling_bee(source) if name == SPELLING_BEE else read_questions(name, source, grading)
    if max_examples is not None and max_examples < len(questions):
        sample = sorted(random.Random(seed).sample(range(len(questions)), max_examples))
        questions = [questions[i] for i in sample]
    return NamedTask(name, questions)


def read_questions(name: str, source: str | None, grading: Grading) -> list[Question]:
    published, questions = PUBLISHED.get(name), list[Question]()
    for where, record in task_records(name, source):
        question = question_of(record if grading == "number" else {"grading": grading} | record, where)
        if questions and type(question) is not type(questions[0]):
            raise UserError(
                f"{where}: a record of {question.name} among records of {questions[0].name}; split the file"
            )
        if published and question.name != published.kind:
            raise UserError(
                f"{where}: a record of {question.name}, but the published task {name} has those of {published.kind}; "
                "give the task another name"
            )
        questions.append(question)
    return questions


def task_records(name: str, source: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) of a task's source, or of its published one."""
    if source is not None:
        yield from read_records([source], "tasks")
        return
    try:
        yield from read_records([PUBLISHED[name].source], "tasks")
    except UserError as error:
        raise UserError(f"{error}, or give {name}=FILE") from error


def spelling_bee(source: str | None) -> list[Question]:
    """Return the test questions of SpellingBee about the words of `source`, by default the published ones."""
    if source is None:
        source = str(downloaded(PUBLISHED[SPELLING_BEE].source, SPELLING_BEE, keep_words) / WORDS)
    return list(SpellingBee(read_words(source), SPELLING_BEE_QUESTIONS, "test"))


def keep_words(file: IO[bytes], folder: Path) -> None:
    """Copy a list of words into the folder, and check that it is one."""
    with open(folder / WORDS, "wb") as copy:
        shutil.copyfileobj(file, copy)
    read_words(str(folder / WORDS))
