"""Text of any data set as a `datasets` data set with the single column `text`, whole or streamed."""

import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .records import as_object, json_records, parse
from .sources import broke_off, expand, first_text, is_hub_id, load_hub, opening_on_hub, reader_of, reading, root_cause

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

WHOLE_UP_TO = 8 * 2**30  # bytes of local files; more are streamed, not converted to a second copy on disk
READ_BATCH_SIZE = 128  # documents
MIN_SHARDS = 64  # of a stream, to shuffle it well by shards; with fewer it is resharded or loaded completely


def text_source(
    names: Sequence[str], *, what: str = "text files", column: str = "text"
) -> "Dataset | IterableDataset":
    """The documents of [`text_dataset`], streamed if they are many: on the Hub, or local files of over 8 GiB.

    A stream's shards (`num_shards`) are its files or, if these are few, their row groups. If one data set is streamed,
    all are. Args and errors are those of [`text_dataset`].
    """
    found = expand(names, what)
    streams = {name: read_hub(name, column, reshard=True, streaming=True) for name in found if is_hub_id(name)}
    size = sum(os.path.getsize(name) for name in found if name not in streams)
    if size > WHOLE_UP_TO or any(stream.num_shards >= MIN_SHARDS for stream in streams.values()):
        return resharded(read_all(found, column, streams, streaming=True))
    return read_whole(found, what, column)


def text_in_order(
    names: Sequence[str], *, what: str = "text files", column: str = "text"
) -> "Dataset | IterableDataset":
    """The documents of [`text_dataset`], for reading in order and perhaps only in part: the Hub is always streamed."""
    if any(map(is_hub_id, names)):
        return read_all(expand(names, what), column, streaming=True)
    return text_source(names, what=what, column=column)


def text_dataset(names: Sequence[str], *, what: str = "text files", column: str = "text") -> "Dataset":
    """A `datasets.Dataset` with the single column `text`, one document per row, in the order of the sources.

    Args:
        names: Parquet, JSONL, JSON and text files, patterns, folders and Hub ids (see [`expand`]). A text file's
            documents are separated by blank lines.
        what: Name of the setting, for errors.
        column: Column that holds the text, except in text files.

    Raises:
        UserError: Nothing found, unknown file type, unreadable file, or no such column.
    """
    return read_whole(expand(names, what), what, column)


def check_text_files(names: Sequence[str], what: str, column: str = "text") -> None:
    """Raise [`UserError`] if the type or the beginning of a source shows that [`text_dataset`] would refuse it."""
    for name in expand(names, what):
        if is_hub_id(name):
            read_hub(name, column, streaming=True)
        else:
            check_beginning(name, reader_of(name), column)


def read_texts(dataset: "Dataset | IterableDataset", where: str) -> Iterator[str]:
    """Yield the texts of the column `text`; rows without text are skipped.

    Raises:
        UserError: Reading fails midway: no network, a broken file, text that is not UTF-8.
    """
    batches: Iterator[Any] = iter(dataset.iter(READ_BATCH_SIZE))
    read = 0
    while True:
        try:
            batch: list[str | None] = next(batches, {"text": []})["text"]
        except Exception as error:  # the libraries raise many kinds
            if isinstance(cause := root_cause(error), UnicodeDecodeError):
                why = f"not UTF-8 text after row {read} ({cause.reason}); convert it to UTF-8"
                raise UserError(f"{where}: {why}") from error
            raise broke_off(error, where, read) from error
        if not batch:
            return
        read += len(batch)
        yield from (text for text in batch if text is not None)


def read_whole(found: list[str], what: str, column: str) -> "Dataset":
    dataset = read_all(found, column)
    try:
        empty = not any(text and text.strip() for text in dataset["text"])
    except UnicodeDecodeError as error:  # not noticed before the text is read
        raise UserError(f"{what}: not UTF-8 text ({error.reason}); convert the files to UTF-8") from error
    if empty:
        raise UserError(f"{what}: no text in {', '.join(found[:3])}; every document is empty")
    return dataset


def read_all(
    found: Sequence[str], column: str, streams: Mapping[str, "IterableDataset"] | None = None, **options
) -> "Dataset | IterableDataset":
    """Documents of files and Hub data sets, read with the loader's `options` unless they are among the `streams`."""
    opened, parts = streams or {}, []
    for kind, names in groupby(found, lambda name: "hub" if is_hub_id(name) else reader_of(name)):
        if kind == "hub":
            parts += [opened[name] if name in opened else read_hub(name, column, **options) for name in names]
        else:
            parts.append(read_files(list(names), kind, column, **options))
    return parts[0] if len(found) == 1 and is_hub_id(found[0]) else concatenated(parts)


def concatenated(parts: list) -> "Dataset | IterableDataset":
    from datasets import concatenate_datasets

    if len({text_type(part) or "string" for part in parts} - {"null"}) > 1:
        parts = [part if text_type(part) in (None, "string") else as_strings(part) for part in parts]
    return concatenate_datasets(parts)


def as_strings(dataset: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
    from datasets import Dataset, Features, Value

    if isinstance(dataset, Dataset):
        return dataset.cast_column("text", Value("string"))
    return dataset.map(dict, features=Features({"text": Value("string")}))  # a stream's cast leaves its tables as is


def read_hub(name: str, column: str, *, reshard: bool = False, **options) -> "Dataset | IterableDataset":
    with opening_on_hub(name):  # a stream without a schema is read up to its first row, and resharding reads more
        dataset = select_text(load_hub(name, **options), column, name)
        return resharded(dataset) if reshard else dataset


def resharded(stream: "IterableDataset") -> "IterableDataset":
    return stream if stream.num_shards >= MIN_SHARDS else stream.reshard()


def read_files(names: list[str], reader: str, column: str, **options) -> "Dataset | IterableDataset":
    """Documents of local files of one type."""
    from datasets import load_dataset

    for name in names:
        check_beginning(name, reader, column)
    if reader == "text":
        options |= {"sample_by": "paragraph", "encoding": "utf-8-sig"}
    elif reader == "parquet":
        options["columns"] = [column]  # other columns may differ from file to file
        if any(map(has_empty_row_group, names)):  # batches are as large as the first group, unless given
            options["batch_size"] = READ_BATCH_SIZE
    files = [glob.escape(name) for name in names]  # the library interprets patterns
    try:
        return select_text(load_dataset(reader, data_files=files, split="train", **options), column, names[0])
    except Exception as error:
        if len(names) > 1:  # alone, to find the broken file, or because only their other columns do not match
            return concatenated([read_files([name], reader, column, **options) for name in names])
        with reading(names[0], reader):
            if reader == "json" and not isinstance(error, UserError):
                deque(json_records(names[0], None), maxlen=0)  # names the line, which the library does not
            raise


def has_empty_row_group(file: str) -> bool:
    from pyarrow.parquet import read_metadata

    metadata = read_metadata(file)
    return any(metadata.row_group(i).num_rows == 0 for i in range(metadata.num_row_groups))


def check_beginning(name: str, reader: str, column: str) -> None:
    """Raise [`UserError`] if the table or first record lacks the column, or the beginning is not text.

    The library would fill the column silently if another JSON file has it, and a stream would fail on reaching it.
    """
    from fsspec.compression import available_compressions
    from pyarrow.parquet import read_schema

    if name.lower().endswith(".zst") and "zstd" not in available_compressions():
        raise UserError(f"{name}: text in .zst files needs the package zstandard; pip install zstandard")
    with reading(name, reader):
        if reader == "parquet":
            columns = read_schema(name).names
        else:
            number, first = first_text(name)
            if reader == "text" or not first or first.lstrip().startswith("["):  # the library reads arrays
                return
            columns = list(as_object(parse(first, name, number), f"{name}:{number}"))
    if column not in columns:
        raise UserError(missing_column(name, column, columns))


def missing_column(where: str, column: str, columns: Iterable[str]) -> str:
    return f"{where}: no column {column!r}, only {', '.join(columns)}; rename a column or set the column's name"


def select_text(dataset: "Dataset | IterableDataset", column: str, where: str) -> "Dataset | IterableDataset":
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a text stream does not know them in advance
    if column not in columns:
        raise UserError(missing_column(where, column, columns))
    kind = getattr((dataset.features or {}).get(column), "dtype", None)
    if dataset.features and kind not in ("string", "large_string", "string_view", "null"):
        raise UserError(
            f"{where}: column {column!r} holds {kind or 'something'} instead of text; name another one or convert it"
        )
    dataset = dataset.select_columns([column])
    dataset = dataset if column == "text" else dataset.rename_column(column, "text")
    return as_strings(dataset) if kind == "string_view" else dataset


def text_type(dataset: "Dataset | IterableDataset") -> str | None:
    """The type of the texts; None for a stream that does not know it in advance."""
    return dataset.features["text"].dtype if dataset.features else None
