"""Reading what people bring: JSON lines with errors that name file and line, and text from parquet, JSONL, plain files or the Hub."""

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
WHOLE_UP_TO = 8 * 2**30  # bytes of local files; more are streamed instead of unpacked on disk once more
READ_AT_ONCE = 128  # documents
FEWEST_PARTS = 64  # of a stream that is worth shuffling by its parts; one of fewer is loaded whole


def expand(patterns: Sequence[str], what: str) -> list[str]:
    """Files that match the shell patterns, each pattern's matches sorted.

    Raises:
        UserError: There is no pattern, or one matches nothing or an empty file.
    """
    if not patterns:
        raise UserError(f"{what}: no files given; name at least one")
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(str(pattern), recursive=True))
        if not matches and is_hub_id(str(pattern)):
            raise UserError(f"{what}: {pattern} is no local file, and a Hub dataset cannot be read here; give local files")
        if not matches:
            raise UserError(f"{what}: no file matches {pattern!r}; give the path of an existing file, from {Path.cwd()}")
        files += matches
    for name in files:
        if Path(name).is_dir():
            raise UserError(f"{what}: {name} is a folder; give its files, for instance '{name}/*.parquet'")
        if Path(name).stat().st_size == 0:
            raise UserError(f"{what}: {name} is empty; fill it or leave it out")
    return files


def read_jsonl(path: str | Path, arrays_are: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of line number (from 1) and object, blank lines skipped.

    Args:
        arrays_are: Field of which a line that is an array holds the value; None refuses such lines.

    Raises:
        UserError: The file is missing, or a line is not a JSON object; names file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of an existing JSONL file, from {Path.cwd()}")
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse_line(line, f"{path}:{number}", arrays_are)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error


def parse_line(line: str, where: str, arrays_are: str | None = None) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); correct the line") from error
    if isinstance(record, list) and arrays_are:
        return {arrays_are: record}
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}; correct the line")
    return record


def text_source(
    files: Sequence[str], *, what: str = "text files", column: str = "text"
) -> "Dataset | IterableDataset":
    """The documents of [`text_dataset`], as a stream where they are many: on the Hub, or local files of over 8 GiB.

    A stream's parts (`num_shards`) are its files or, where these are few, their row groups. Args and errors are those
    of [`text_dataset`].
    """
    if len(files) == 1 and is_hub_id(files[0]):
        stream = in_parts(read_hub(files[0], column, streaming=True))
        return stream if stream.num_shards >= FEWEST_PARTS else read_hub(files[0], column)
    return local_source(files, what, column)


def text_in_order(
    files: Sequence[str], *, what: str = "text files", column: str = "text"
) -> "Dataset | IterableDataset":
    """The documents of [`text_dataset`], to be read in their order and perhaps not to the end: the Hub only as a stream."""
    if len(files) == 1 and is_hub_id(files[0]):
        return read_hub(files[0], column, streaming=True)
    return local_source(files, what, column)


def check_text_files(files: Sequence[str], what: str, column: str = "text") -> None:
    """Raise [`UserError`] where the kind or the beginning of a local file shows that [`text_dataset`] would refuse it.

    A Hub dataset is not looked at.
    """
    if len(files) == 1 and is_hub_id(files[0]):
        return
    for name in expand_text(files, what):
        reader = reader_of(name)
        try:
            check_beginning(name, reader, column)
        except UserError:
            raise
        except Exception as error:  # the libraries raise many kinds
            raise unreadable(name, reader, error) from error


def local_source(files: Sequence[str], what: str, column: str) -> "Dataset | IterableDataset":
    names = expand_text(files, what)
    if sum(Path(name).stat().st_size for name in names) > WHOLE_UP_TO:
        return in_parts(read_files(names, column, streaming=True))
    return whole_dataset(names, what, column)


def text_dataset(files: Sequence[str], *, what: str = "text files", column: str = "text") -> "Dataset":
    """A `datasets.Dataset` with the single column `text`, one document a row, in the order of the files.

    Args:
        files: Local parquet, JSONL or text files, also compressed, or patterns (a text file's documents are separated
            by blank lines), or one Hub dataset id, optionally with `:split` or `:configuration:split`.
        what: Name of the setting, for errors.
        column: Column that holds the text in parquet and JSONL files.

    Raises:
        UserError: Nothing found, unknown file type, unreadable file, or no such column.
    """
    if len(files) == 1 and is_hub_id(files[0]):
        return read_hub(files[0], column)
    return whole_dataset(expand_text(files, what), what, column)


def expand_text(files: Sequence[str], what: str) -> list[str]:
    """[`expand`], for text; a Hub dataset among several entries has an error of its own."""
    for name in files:
        if len(files) > 1 and is_hub_id(name):
            raise UserError(f"{what}: the Hub dataset {name} must be the only entry; give it alone, or local files only")
    return expand(files, what)


def whole_dataset(names: list[str], what: str, column: str) -> "Dataset":
    dataset = read_files(names, column)
    try:
        empty = not any(text and text.strip() for text in dataset["text"])
    except UnicodeDecodeError as error:  # not noticed until it is read
        raise UserError(f"{what}: not UTF-8 text ({error.reason}); convert the files to UTF-8") from error
    if empty:
        raise UserError(f"{what}: no text in {', '.join(names[:3])}; every document is empty")
    return dataset


def read_texts(dataset: "Dataset | IterableDataset", where: str) -> Iterator[str]:
    """The texts of a column `text` one after the other, rows without one left out.

    Raises:
        UserError: Reading fails on the way: no network, a broken file, text that is not UTF-8.
    """
    batches, read = iter(dataset.iter(READ_AT_ONCE)), 0
    while True:
        try:
            batch = next(batches, {}).get("text", [])
        except Exception as error:  # the libraries raise many kinds
            if isinstance(cause := innermost(error), UnicodeDecodeError):
                raise UserError(f"{where}: not UTF-8 text after row {read} ({cause.reason}); convert it to UTF-8") from error
            raise UserError(f"{where}: reading failed after row {read} ({first_line(error)})") from error
        if not batch:
            return
        read += len(batch)
        yield from (text for text in batch if text is not None)


def is_hub_id(name: str) -> bool:
    """`owner/name`, perhaps with `:split` or `:configuration:split`, neither a local path nor a pattern for one."""
    owner, _, rest = name.partition("/")
    no_path = not glob.glob(name) and not any(character in name for character in "*?[\\ ")
    named = bool(owner) and owner not in (".", "..", "~") and bool(rest) and rest.count("/") == 0
    return named and no_path and suffix(rest.split(":")[0]) not in READERS


def suffix(name: str) -> str:
    """The ending that tells the kind of file, whether or not it is compressed."""
    path = Path(name)
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def read_hub(name: str, column: str, **options):
    from datasets import load_dataset

    repository, *configuration, split = name.split(":") if ":" in name else (name, "train")
    if len(configuration) > 1:
        raise UserError(f"{name}: too many colons; write owner/name, owner/name:split or owner/name:configuration:split")
    try:
        dataset = load_dataset(repository, *configuration, split=split or "train", **options)
    except Exception as error:  # the library raises many kinds for "not found", "no network", "no such split"
        raise UserError(f"{repository}: could not be loaded from the Hub ({first_line(error)})") from error
    return only_text(dataset, column, repository)


def in_parts(stream: "IterableDataset") -> "IterableDataset":
    return stream if stream.num_shards >= FEWEST_PARTS else stream.reshard()


def read_files(names: Sequence[str], column: str, **options):
    """Documents of local files, those of one kind that follow each other read together."""
    from datasets import concatenate_datasets

    kinds = groupby(names, reader_of)
    return concatenate_datasets([read_text_files(list(files), kind, column, **options) for kind, files in kinds])


def reader_of(name: str) -> str:
    reader = READERS.get(suffix(name))
    if reader is None:
        raise UserError(f"{name}: unknown kind of file; use {', '.join(sorted(READERS))}")
    return reader


def read_text_files(names: list[str], reader: str, column: str, **options):
    from datasets import load_dataset

    if reader == "text":
        options["sample_by"] = "paragraph"
    try:
        for name in names:
            check_beginning(name, reader, column)
        if reader == "parquet":
            options["columns"] = [column]  # other columns may differ from file to file
        return only_text(load_dataset(reader, data_files=names, split="train", **options), column, names[0])
    except Exception as error:  # corrupt parquet, wrong encoding: one line instead of the library's chain
        if len(names) > 1:  # which of them?
            for name in names:
                read_text_files([name], reader, column, **options)
        if isinstance(error, UserError):
            raise
        binary = isinstance(innermost(error), UnicodeDecodeError)
        if reader == "json" and not binary and Path(names[0]).suffix.lower() not in COMPRESSED:
            list(read_jsonl(names[0]))  # the library refuses a whole file without naming the line that is wrong
        raise unreadable(names[0], reader, error) from error


def unreadable(name: str, reader: str, error: Exception) -> UserError:
    if isinstance(cause := innermost(error), UnicodeDecodeError):
        return UserError(f"{name}: not UTF-8 text ({cause.reason}); convert the file to UTF-8")
    return UserError(f"{name}: cannot be read as {reader} ({first_line(error)}); give a file of that kind")


def check_beginning(name: str, reader: str, column: str) -> None:
    """Refuse a file whose table or first record has no such column, or whose beginning is not text."""
    if reader == "parquet":
        table_has(column, name)
    elif reader == "json":
        first_record_has(column, name)
    else:
        beginning(name)


def beginning(name: str) -> tuple[int, str]:
    """Number (from 1) and text of the first line that is not blank, empty if there is none."""
    import fsspec

    with fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer") as lines:
        return next(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (1, ""))


def first_record_has(column: str, name: str) -> None:
    """Of several JSON files, the library fills up what one of them lacks, without a word."""
    number, first = beginning(name)
    if first and not first.lstrip().startswith("["):  # a file that is one array is left to the library
        columns = parse_line(first, f"{name}:{number}")
        if column not in columns:
            raise UserError(missing_column(name, column, columns))


def table_has(column: str, name: str) -> None:
    """A stream would notice a file without the column only when it comes to it."""
    import fsspec
    from pyarrow.parquet import read_schema

    with fsspec.open(name, "rb", compression="infer") as file:
        columns = read_schema(file).names
    if column not in columns:
        raise UserError(missing_column(name, column, columns))


def missing_column(where: str, column: str, columns: Iterable[str]) -> str:
    return f"{where}: no column {column!r}, only {', '.join(columns)}; rename one or set it"


def only_text(dataset: "Dataset | IterableDataset", column: str, where: str) -> "Dataset | IterableDataset":
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream of text does not know them beforehand
    if column not in columns:
        raise UserError(missing_column(where, column, columns))
    kind = getattr((dataset.features or {}).get(column), "dtype", None)
    if dataset.features and kind not in ("string", "large_string", "null"):
        raise UserError(f"{where}: column {column!r} holds {kind or 'something'} instead of text; name another or correct it")
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def first_line(error: BaseException) -> str:
    """First line of the innermost cause, where the libraries say what is really wrong."""
    error = innermost(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
