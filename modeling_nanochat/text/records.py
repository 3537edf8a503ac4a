"""Records of any data set, one after the other: conversations, problems, questions, log entries."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from .sources import broke_off, expand, first_line, first_text, is_hub_id, load_hub, open_text, reader_of, reading

BATCH = 1000  # rows of a parquet file in memory
Record = dict[str, Any]


def read_records(
    names: Sequence[str], what: str, *, arrays_are: str | None = None, first: int | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield (where, record): `file:line` for JSONL, `file, record n` for a JSON array, `source, row n` otherwise.

    A field that is None in a parquet file or on the Hub is left out: in a table every row has the fields of all rows.

    Args:
        names: Parquet, JSONL and JSON files, patterns, folders and Hub ids (see [`expand`]).
        what: Name of the setting, for errors.
        arrays_are: Field that takes the value of a JSONL line that is an array; None refuses such lines.
        first: Read only the first records of each file or Hub data set, which is then streamed; None: all records.

    Raises:
        UserError: A source is missing, broken, of another kind or without a record; names file and line.
    """
    for source in expand(names, what):
        records = islice(source_records(source, what, arrays_are, first), first)
        if (found := next(records, None)) is None:
            raise UserError(f"{what}: {source} is empty; fill it or leave it out")
        yield found
        yield from records


def source_records(source: str, what: str, arrays_are: str | None, first: int | None) -> Iterator[tuple[str, Record]]:
    if is_hub_id(source):
        return hub_rows(source, streaming=first is not None)
    if (reader := reader_of(source)) == "text":
        raise UserError(f"{what}: {source} is text without fields; give JSONL, parquet or a Hub data set")
    return parquet_rows(source) if reader == "parquet" else json_records(source, arrays_are)


def hub_rows(name: str, streaming: bool) -> Iterator[tuple[str, Record]]:
    from datasets import config

    rows = iter(load_hub(name, streaming=streaming and not config.HF_HUB_OFFLINE))  # offline it may be in the cache
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the libraries raise many kinds
            raise broke_off(error, name, number) from error
        if row is None:
            return
        number += 1
        yield f"{name}, row {number}", present(row)


def parquet_rows(file: str) -> Iterator[tuple[str, Record]]:
    from datasets import Dataset  # decodes columns of JSON
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

    number = 0
    with reading(file, "parquet"), ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH):
            columns = Dataset(Table.from_batches([batch]), fingerprint=file)[:]
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield f"{file}, row {number}", present(dict(zip(columns, values, strict=True)))


def present(value: Any) -> Any:
    """`value` without the fields that are None."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    return [present(item) for item in value] if isinstance(value, list) else value


def json_records(file: str, arrays_are: str | None) -> Iterator[tuple[str, Record]]:
    with reading(file, "json"):
        _, line = first_text(file)
        if not begins_array(line):
            yield from ((f"{file}:{number}", record) for number, record in read_jsonl(file, arrays_are))
            return
        with open_text(file) as text:
            content = parse(text.read(), file)
        for number, record in enumerate([content] if is_conversation(content) else content, start=1):
            where = f"{file}, record {number}"
            yield where, as_object(record, where, arrays_are)


def begins_array(line: str) -> bool:
    """Whether a file whose first line this is holds one array of records, not one array of messages per line."""
    try:
        return line.lstrip().startswith("[") and not is_conversation(json.loads(line))
    except (ValueError, RecursionError):  # it ends on a later line
        return True


def is_conversation(value: list) -> bool:
    return any(isinstance(item, dict) and "role" in item for item in value)


def read_jsonl(path: str | Path, arrays_are: str | None = None) -> Iterator[tuple[int, Record]]:
    """Yield the line number (from 1) and the object of each non-blank line.

    Args:
        arrays_are: Field that takes the value of a line that is an array; None refuses such lines.

    Raises:
        UserError: The file is missing, or a line is not a JSON object; names file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of an existing JSONL file, from {Path.cwd()}")
    with reading(str(path), "json"), open_text(str(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, as_object(parse(line, path, number), f"{path}:{number}", arrays_are)


def parse(text: str, path: str | Path, line: int | None = None) -> Any:
    """The value of JSON text, which is line `line` of the file or, if that is None, the whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); correct the line") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, thousands of nested brackets
        where = f"{path}:{line}" if line else f"{path}"
        raise UserError(f"{where}: not readable as JSON ({first_line(error)}); correct it or leave it out") from error


def as_object(value: Any, where: str, arrays_are: str | None = None) -> Record:
    if isinstance(value, list) and arrays_are:
        return {arrays_are: value}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}; correct the line")
    return value
