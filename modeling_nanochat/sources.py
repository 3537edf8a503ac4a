"""Reading what people bring: JSON lines with errors that name file and line, and text from parquet, JSONL, plain files or the Hub."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def expand(patterns: Sequence[str], what: str) -> list[str]:
    """Files that match the shell patterns, each pattern's matches sorted.

    Raises:
        UserError: A pattern matches nothing, or matches an empty file.
    """
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(str(pattern), recursive=True))
        if not matches:
            raise UserError(f"{what}: no file matches {pattern!r}; give the path of an existing file, from {Path.cwd()}")
        files += matches
    for name in files:
        if Path(name).is_dir():
            raise UserError(f"{what}: {name} is a folder; give its files, for instance '{name}/*.parquet'")
        if Path(name).stat().st_size == 0:
            raise UserError(f"{what}: {name} is empty; fill it or leave it out")
    return files


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of line number (from 1) and object, blank lines skipped.

    Raises:
        UserError: The file is missing, or a line is not a JSON object; names file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of an existing JSONL file, from {Path.cwd()}")
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse_line(line, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error


def parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); correct the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}; correct the line")
    return record


def text_dataset(files: Sequence[str], *, what: str = "text files", column: str = "text") -> "Dataset":
    """A `datasets.Dataset` with the single column `text`, one document a row, in the order of the files.

    Args:
        files: Local parquet, JSONL or text files or patterns (a text file's documents are separated by blank lines),
            or one Hub dataset id, optionally with `:split`.
        what: Name of the setting, for errors.
        column: Column that holds the text in parquet and JSONL files.

    Raises:
        UserError: Nothing found, unknown file type, unreadable file, or no such column.
    """
    from datasets import concatenate_datasets

    if len(files) == 1 and is_hub_id(files[0]):
        return read_hub(files[0], column)
    names = expand(files, what)
    parts = [read_text_file(name, column) for name in names]
    dataset = concatenate_datasets(parts)
    if not any(text and text.strip() for text in dataset["text"]):
        raise UserError(f"{what}: no text in {', '.join(names[:3])}; every document is empty")
    return dataset


def is_hub_id(name: str) -> bool:
    """`owner/name`, with an optional `:split`, that is neither a local path nor a pattern for one."""
    owner, _, rest = name.partition("/")
    no_path = not glob.glob(name) and not any(character in name for character in "*?[\\ ")
    return bool(owner) and owner not in (".", "..", "~") and rest.count("/") == 0 and no_path and bool(rest) and Path(
        rest.split(":")[0]
    ).suffix not in READERS


def read_hub(name: str, column: str) -> "Dataset":
    from datasets import load_dataset

    repository, _, split = name.partition(":")
    try:
        dataset = load_dataset(repository, split=split or "train")
    except Exception as error:  # the library raises many kinds for "not found", "no network", "no such split"
        raise UserError(f"{repository}: could not be loaded from the Hub ({first_line(error)})") from error
    return only_text(dataset, column, repository)


def read_text_file(name: str, column: str) -> "Dataset":
    from datasets import load_dataset

    reader = READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise UserError(f"{name}: unknown kind of file; use {', '.join(sorted(READERS))}")
    if reader == "json":  # the library refuses a whole file without naming the line that is wrong
        for _ in read_jsonl(name):
            pass
    options = {"sample_by": "paragraph"} if reader == "text" else {}
    try:
        dataset = load_dataset(reader, data_files=[name], split="train", **options)
    except Exception as error:  # corrupt parquet, wrong encoding: one line instead of the library's chain
        raise UserError(f"{name}: cannot be read as {reader} ({first_line(error)})") from error
    return only_text(dataset, column, name)


def only_text(dataset: "Dataset", column: str, where: str) -> "Dataset":
    if column not in dataset.column_names:
        raise UserError(f"{where}: no column {column!r}, only {', '.join(dataset.column_names)}; rename one or set it")
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def first_line(error: BaseException) -> str:
    """First line of the innermost cause, where the libraries say what is really wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
