"""Reading of user data: JSONL with errors that name file and line; text from parquet, JSONL, text files or the Hub."""

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
WHOLE_UP_TO = 8 * 2**30  # bytes of local files; more are streamed, not converted to a second copy on disk
READ_BATCH_SIZE = 128  # documents
MIN_SHARDS = 64  # of a stream, to shuffle it well by shards; with fewer it is resharded or loaded completely


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
            raise UserError(
                f"{what}: {pattern} is not a local file, and a Hub dataset cannot be read here; give local files"
            )
        if not matches:
            raise UserError(
                f"{what}: no file matches {pattern!r}; give the path of an existing file, from {Path.cwd()}"
            )
        files += matches
    for name in files:
        if Path(name).is_dir():
            raise UserError(f"{what}: {name} is a folder; give its files, for instance '{name}/*.parquet'")
        if Path(name).stat().st_size == 0:
            raise UserError(f"{what}: {name} is empty; fill it or leave it out")
    return files


def read_jsonl(path: str | Path, arrays_are: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number (from 1) and the object of each non-blank line.

    Args:
        arrays_are: Field that takes the value of a line that is an array; None refuses such lines.

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
    """The documents of [`text_dataset`], streamed if they are many: on the Hub, or local files of over 8 GiB.

    A stream's shards (`num_shards`) are its files or, if these are few, their row groups. Args and errors are those of
    [`text_dataset`].
    """
    if len(files) == 1 and is_hub_id(files[0]):
        stream = resharded(read_hub(files[0], column, streaming=True))
        return stream if stream.num_shards >= MIN_SHARDS else read_hub(files[0], column)
    return local_source(files, what, column)


def text_in_order(
    files: Sequence[str], *, what: str = "text files", column: str = "text"
) -> "Dataset | IterableDataset":
    """The documents of [`text_dataset`], for reading in order and perhaps only in part: the Hub is always streamed."""
    if len(files) == 1 and is_hub_id(files[0]):
        return read_hub(files[0], column, streaming=True)
    return local_source(files, what, column)


def check_text_files(files: Sequence[str], what: str, column: str = "text") -> None:
    """Raise [`UserError`] if the type or the beginning of a local file shows that [`text_dataset`] would refuse it.

    A Hub dataset is not checked.
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
            raise reading_error(name, reader, error) from error


def local_source(files: Sequence[str], what: str, column: str) -> "Dataset | IterableDataset":
    names = expand_text(files, what)
    if sum(Path(name).stat().st_size for name in names) > WHOLE_UP_TO:
        return resharded(read_files(names, column, streaming=True))
    return loaded_dataset(names, what, column)


def text_dataset(files: Sequence[str], *, what: str = "text files", column: str = "text") -> "Dataset":
    """A `datasets.Dataset` with the single column `text`, one document per row, in the order of the files.

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
    return loaded_dataset(expand_text(files, what), what, column)


def expand_text(files: Sequence[str], what: str) -> list[str]:
    """[`expand`] for text; a Hub dataset among several entries is a separate error."""
    for name in files:
        if len(files) > 1 and is_hub_id(name):
            raise UserError(
                f"{what}: the Hub dataset {name} must be the only entry; give it alone, or local files only"
            )
    return expand(files, what)


def loaded_dataset(names: list[str], what: str, column: str) -> "Dataset":
    dataset = read_files(names, column)
    try:
        empty = not any(text and text.strip() for text in dataset["text"])
    except UnicodeDecodeError as error:  # not noticed before the text is read
        raise UserError(f"{what}: not UTF-8 text ({error.reason}); convert the files to UTF-8") from error
    if empty:
        raise UserError(f"{what}: no text in {', '.join(names[:3])}; every document is empty")
    return dataset


def read_texts(dataset: "Dataset | IterableDataset", where: str) -> Iterator[str]:
    """Yield the texts of the column `text`; rows without text are skipped.

    Raises:
        UserError: Reading fails midway: no network, a broken file, text that is not UTF-8.
    """
    batches, read = iter(dataset.iter(READ_BATCH_SIZE)), 0
    while True:
        try:
            batch = next(batches, {}).get("text", [])
        except Exception as error:  # the libraries raise many kinds
            if isinstance(cause := root_cause(error), UnicodeDecodeError):
                why = f"not UTF-8 text after row {read} ({cause.reason}); convert it to UTF-8"
                raise UserError(f"{where}: {why}") from error
            raise UserError(f"{where}: reading failed after row {read} ({first_line(error)})") from error
        if not batch:
            return
        read += len(batch)
        yield from (text for text in batch if text is not None)


def is_hub_id(name: str) -> bool:
    """Whether `name` is `owner/name`, `owner/name:split` or `owner/name:configuration:split`, not a path."""
    owner, _, rest = name.partition("/")
    no_path = not glob.glob(name) and not any(character in name for character in "*?[\\ ")
    named = bool(owner) and owner not in (".", "..", "~") and bool(rest) and rest.count("/") == 0
    return named and no_path and suffix(rest.split(":")[0]) not in READERS


def suffix(name: str) -> str:
    """The file extension that tells the type, without that of a compression."""
    path = Path(name)
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def read_hub(name: str, column: str, **options):
    from datasets import load_dataset

    repository, *configuration, split = name.split(":") if ":" in name else (name, "train")
    if len(configuration) > 1:
        raise UserError(
            f"{name}: too many colons; write owner/name, owner/name:split or owner/name:configuration:split"
        )
    try:
        dataset = load_dataset(repository, *configuration, split=split or "train", **options)
    except Exception as error:  # the library raises many kinds for "not found", "no network", "no such split"
        raise UserError(f"{repository}: could not be loaded from the Hub ({first_line(error)})") from error
    return select_text(dataset, column, repository)


def resharded(stream: "IterableDataset") -> "IterableDataset":
    return stream if stream.num_shards >= MIN_SHARDS else stream.reshard()


def read_files(names: Sequence[str], column: str, **options):
    """Documents of local files; consecutive files of one type are read together."""
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
        return select_text(load_dataset(reader, data_files=names, split="train", **options), column, names[0])
    except Exception as error:  # corrupt parquet, wrong encoding: one line instead of the library's traceback
        if len(names) > 1:  # read each alone to find the broken file
            for name in names:
                read_text_files([name], reader, column, **options)
        if isinstance(error, UserError):
            raise
        binary = isinstance(root_cause(error), UnicodeDecodeError)
        if reader == "json" and not binary and Path(names[0]).suffix.lower() not in COMPRESSED:
            list(read_jsonl(names[0]))  # names the line, which the library does not
        raise reading_error(names[0], reader, error) from error


def reading_error(name: str, reader: str, error: Exception) -> UserError:
    if isinstance(cause := root_cause(error), UnicodeDecodeError):
        return UserError(f"{name}: not UTF-8 text ({cause.reason}); convert the file to UTF-8")
    return UserError(f"{name}: cannot be read as {reader} ({first_line(error)}); give a file of that kind")


def check_beginning(name: str, reader: str, column: str) -> None:
    """Raise an error if the table or first record lacks the column, or the beginning is not text."""
    if reader == "parquet":
        check_table(column, name)
    elif reader == "json":
        check_first_record(column, name)
    else:
        beginning(name)


def beginning(name: str) -> tuple[int, str]:
    """Number (from 1) and text of the first non-blank line; empty text if there is none."""
    import fsspec

    with fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer") as lines:
        return next(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (1, ""))


def check_first_record(column: str, name: str) -> None:
    """Raise [`UserError`] without the column: the library would silently fill it if another JSON file has it."""
    number, first = beginning(name)
    if first and not first.lstrip().startswith("["):  # a file with a single array is left to the library
        columns = parse_line(first, f"{name}:{number}")
        if column not in columns:
            raise UserError(missing_column(name, column, columns))


def check_table(column: str, name: str) -> None:
    """Raise [`UserError`] without the column: a stream would fail only on reaching the file."""
    import fsspec
    from pyarrow.parquet import read_schema

    with fsspec.open(name, "rb", compression="infer") as file:
        columns = read_schema(file).names
    if column not in columns:
        raise UserError(missing_column(name, column, columns))


def missing_column(where: str, column: str, columns: Iterable[str]) -> str:
    return f"{where}: no column {column!r}, only {', '.join(columns)}; rename a column or set the column's name"


def select_text(dataset: "Dataset | IterableDataset", column: str, where: str) -> "Dataset | IterableDataset":
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a text stream does not know them in advance
    if column not in columns:
        raise UserError(missing_column(where, column, columns))
    kind = getattr((dataset.features or {}).get(column), "dtype", None)
    if dataset.features and kind not in ("string", "large_string", "null"):
        raise UserError(
            f"{where}: column {column!r} holds {kind or 'something'} instead of text; name another one or convert it"
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def first_line(error: BaseException) -> str:
    """First line of the root cause, where the libraries state the actual problem."""
    error = root_cause(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
