"""What the name of a data set stands for: local files, a folder laid out as on the Hub, or a data set on the Hub."""

import glob
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SECONDS_TO_ANSWER = 30.0  # of the Hub, for requests without a limit of their own


def expand(names: Sequence[str], what: str) -> list[str]:
    """The files and Hub ids that `names` stand for, in order; parquet files without rows are reported and left out.

    Args:
        names: Local files, shell patterns (their matches are sorted), folders laid out as on the Hub and Hub ids, the
            last two optionally with `:split` or `:configuration:split`. A local folder precedes a Hub id.
        what: Name of the setting, for errors.

    Raises:
        UserError: There is no name, or one stands for nothing or an empty file.
    """
    if not names:
        raise UserError(f"{what}: no files given; name at least one")
    found = [source for name in map(str, names) for source in ([name] if is_hub_id(name) else local_files(name, what))]
    empty = {source for source in found if not is_hub_id(source) and lacks_rows(source)}
    if empty.issuperset(found):
        raise UserError(f"{what}: {found[0]} is empty; fill it or leave it out")
    for source in sorted(empty):
        print(f"{what}: {source} has no rows; skipped", flush=True)
    return [source for source in found if source not in empty]


def is_hub_id(name: str) -> bool:
    """Whether `name` is `owner/name`, `owner/name:split` or `owner/name:configuration:split`, not a path."""
    owner, _, rest = name.partition("/")
    no_path = not (glob.glob(name) or split_folder(name)) and not any(character in name for character in "*?[\\ ")
    named = bool(owner) and owner not in (".", "..", "~") and bool(rest) and rest.count("/") == 0
    return named and no_path and suffix(rest.split(":")[0]) not in READERS


def local_files(name: str, what: str) -> list[str]:
    path = os.path.expanduser(name)
    if found := split_folder(path):
        files = folder_files(*found)
    else:  # an existing file's name may contain brackets, which a pattern would interpret
        files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"{what}: no file matches {name!r}; give the path of an existing file, from {Path.cwd()}")
    for file in files:
        if os.path.isdir(file):
            raise UserError(f"{what}: {file} is a folder; give its files, for instance '{file}/*.parquet'")
        if not os.path.exists(file):
            raise UserError(f"{what}: {file} is a link to a missing file; restore it or leave it out")
        if os.path.getsize(file) == 0:
            raise UserError(f"{what}: {file} is empty; fill it or leave it out")
    return files


def split_folder(name: str) -> tuple[str, list[str]] | None:
    """The existing folder in `folder`, `folder:split` or `folder:configuration:split`, and what follows it."""
    for colons in range(3):
        folder, *rest = name.rsplit(":", colons)
        if os.path.isdir(folder):
            return folder, rest
    return None


def folder_files(folder: str, rest: list[str]) -> list[str]:
    """Files of one split of a folder, by the `configs` in its README or the Hub's rules for names of files.

    Raises:
        UserError: No data files, or no such configuration or split.
    """
    from datasets import load_dataset_builder

    configuration, split = configuration_and_split(rest)
    try:
        splits = load_dataset_builder(folder, *configuration).config.data_files
    except Exception as error:  # the library raises many kinds
        why = first_line(error, lines=2)
        raise UserError(
            f"{folder}: not a data set as on the Hub ({why}); give files, like '{folder}/*.jsonl'"
        ) from error
    if split not in splits:
        raise UserError(f"{folder}: no split {split!r}, only {', '.join(map(str, splits))}; write {folder}:split")
    return list(splits[split])


def configuration_and_split(rest: list[str]) -> tuple[list[str], str]:
    *configuration, split = rest or [""]
    return configuration, split or "train"


def load_hub(name: str, **options) -> "Dataset | IterableDataset":
    """One split of a data set on the Hub. `options` are those of `datasets.load_dataset`.

    Raises:
        UserError: There is no such data set, configuration or split, or no network.
    """
    from datasets import load_dataset

    repository, *rest = name.split(":")
    if len(rest) > 2:
        raise UserError(
            f"{name}: too many colons; write owner/name, owner/name:split or owner/name:configuration:split"
        )
    limit_waiting()
    configuration, split = configuration_and_split(rest)
    with opening_on_hub(name):
        return load_dataset(repository, *configuration, split=split, **options)


def limit_waiting() -> None:
    """Let a request to the Hub fail if nothing arrives for `SECONDS_TO_ANSWER`.

    huggingface_hub sets no limit for most requests: a server that accepts connections and stays silent would hold them
    forever. What changes the Hub has as long as it takes.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    factory = _http._GLOBAL_CLIENT_FACTORY  # the user's, perhaps
    if getattr(factory, "func", None) is not client_with_limit:
        set_client_factory(partial(client_with_limit, factory))


def client_with_limit(factory: Callable[[], Any]) -> Any:
    client = factory()
    client.event_hooks["request"].append(set_limit)
    return client


def set_limit(request: Any) -> None:
    if request.method in ("GET", "HEAD") or "/paths-info/" in str(request.url):
        given = request.extensions.get("timeout") or {}
        limits = {kind: given.get(kind) or SECONDS_TO_ANSWER for kind in ("connect", "read", "write", "pool")}
        request.extensions["timeout"] = limits


@contextmanager
def opening_on_hub(name: str) -> Iterator[None]:
    """Report in one line why a data set on the Hub cannot be opened."""
    from datasets.exceptions import DatasetNotFoundError

    from ..hub import GATED, MISSING, hub_failure

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        repository = name.partition(":")[0]
        failure = hub_failure(error, "data set")
        if isinstance(error, DatasetNotFoundError):  # `datasets` drops the cause
            failure = (GATED if "gated" in str(error) else MISSING).format("data set")
        if failure:
            raise UserError(f"{repository}: no local file or folder, and {failure}") from error
        what_to_do = "correct its files or give another data set"
        if type(error) is ValueError:  # no such configuration or split; errors about the data are of subclasses
            what_to_do = f"write {repository}:split or {repository}:configuration:split"
        raise UserError(f"{name}: cannot be opened ({first_line(error, lines=2)}); {what_to_do}") from error


def versions(names: Sequence[str], what: str) -> list[tuple]:
    """What changes when the content of the sources `names` does: commits on the Hub, size and time of local files.

    Raises:
        UserError: As [`expand`]; or the Hub does not tell.
    """
    from huggingface_hub import dataset_info

    found: list[tuple] = []
    for name in expand(names, what):
        if is_hub_id(name):
            limit_waiting()
            with opening_on_hub(name):
                found.append((name, dataset_info(name.partition(":")[0], timeout=SECONDS_TO_ANSWER).sha))
        else:
            status = os.stat(name)
            found.append((os.path.realpath(name), status.st_size, status.st_mtime_ns))
    return found


def lacks_rows(file: str) -> bool:
    """Whether `file` is a parquet file of 0 rows. False for one that is broken: its reader says why."""
    if suffix(file) != ".parquet":
        return False
    from pyarrow.parquet import read_metadata

    try:
        return read_metadata(file).num_rows == 0
    except (OSError, ValueError):
        return False


def suffix(name: str) -> str:
    """The file extension that tells the type, without that of a compression."""
    path = Path(name)
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def reader_of(name: str) -> str:
    reader = READERS.get(suffix(name))
    if reader is None:
        raise UserError(f"{name}: unknown kind of file; use {', '.join(sorted(READERS))}")
    return reader


def open_text(name: str) -> TextIO:
    """Open a file, compressed or not, as UTF-8 text without its byte-order mark."""
    compression = Path(name).suffix.lower()
    if compression not in COMPRESSED:
        return open(name, encoding="utf-8-sig")
    if compression == ".zst":  # fsspec would need the package zstandard
        from pyarrow import input_stream

        return io.TextIOWrapper(input_stream(name, compression="zstd"), encoding="utf-8-sig")
    import fsspec

    return fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer").open()


def first_text(name: str) -> tuple[int, str]:
    """Number (from 1) and text of the first non-blank line; empty text if there is none."""
    with open_text(name) as lines:
        return next(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), (1, ""))


@contextmanager
def reading(name: str, reader: str) -> Iterator[None]:
    """Report in one line what the libraries raise on a file that is broken or of another kind."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        if isinstance(cause := root_cause(error), UnicodeDecodeError):
            raise UserError(f"{name}: not UTF-8 text ({cause.reason}); convert the file to UTF-8") from error
        why = f"{name}: cannot be read as {reader} ({first_line(error)})"
        raise UserError(f"{why}; give a file of that kind") from error


def broke_off(error: BaseException, where: str, row: int) -> UserError:
    """The error of a data set that could be read up to `row`, on the Hub or local."""
    from ..hub import hub_failure

    failure = hub_failure(error, "data set")
    return UserError(
        f"{where}: reading failed after row {row}" + (f": {failure}" if failure else f" ({first_line(error)})")
    )


def may_recover(error: BaseException) -> bool:
    """Whether the Hub may serve later what failed: no connection, too many requests, an error of its own."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    from ..hub import causes, hub_failure

    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    return hub_failure(error) is not None and not constants.HF_HUB_OFFLINE


def first_line(error: BaseException, lines: int = 1) -> str:
    """First line or lines of the root cause, where the libraries state the actual problem."""
    error = root_cause(error)
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:lines])


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
