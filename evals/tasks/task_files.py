"""Evaluation tasks from JSONL files; the kind of a task is detected from the fields of its first record."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_jsonl

from .formats import check_cloze, check_gsm8k, check_match, kind_of, multiple_choice_question

KINDS = "GSM8K, match, ARC, MMLU or cloze"


@dataclass(frozen=True)
class Task:
    """A named list of examples of one kind.

    `kind` is "gsm8k", "match" or "cloze" with records as examples (see `formats`), or "multiple_choice" with
    `MultipleChoiceQuestion`s, read from ARC or MMLU records.
    """

    name: str
    kind: str
    examples: Sequence[Any]


def parse_task_argument(argument: str) -> tuple[str, str]:
    """Return name and path of `name=path`; a bare path is named after its file."""
    name, equals, path = argument.partition("=")
    if not equals:
        return Path(argument).stem, argument
    if not name or not path:
        raise UserError(f"eval_files: {argument!r} is not name=path; write for example facts=data/eval/facts.jsonl")
    return name, path


def load_task(name: str, path: str | Path, max_examples: int | None = None, seed: int = 0) -> Task:
    """Read and check a task file.

    Args:
        name: Name of the task in the results.
        path: JSONL file.
        max_examples: Size of a random sample, because files are often sorted by subject; it keeps the file order.
        seed: Seed of the sample.

    Raises:
        UserError: The file is missing or empty, or a record is malformed or unlike the first; names the line.
    """
    examples, kind = [], None
    for number, record in read_jsonl(path):
        found = kind_of(record)
        kind = kind or found
        if found != kind:
            raise UserError(f"{path}:{number}: a record of kind {found} among records of kind {kind}; split the file")
        examples.append(checked_example(record, kind, f"{path}:{number}"))
    if not examples:
        raise UserError(f"{path}: no examples; fill the file or remove task {name!r}")
    if max_examples is not None and max_examples < len(examples):
        sample = sorted(random.Random(seed).sample(range(len(examples)), max_examples))
        examples = [examples[i] for i in sample]
    return Task(name, "multiple_choice" if kind in ("arc", "mmlu") else kind, examples)


def checked_example(record: dict[str, Any], kind: str | None, where: str) -> Any:
    if kind in ("arc", "mmlu"):
        return multiple_choice_question(record, where)
    checks = {"gsm8k": check_gsm8k, "match": check_match, "cloze": check_cloze}
    if kind not in checks:
        raise UserError(f"{where}: not a {KINDS} record; fields are {', '.join(record) or 'none'}")
    checks[kind](record, where)
    return record
