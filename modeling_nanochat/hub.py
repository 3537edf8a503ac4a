"""Resolve a model name to a folder, and say in one line what failed on the Hub or on the way to it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .errors import UserError, one_line

# The files of a model folder. No subfolders, code or pickles: none of them is ever opened.
MODEL_FILES = ("*.json", "*.jinja", "model*.safetensors", "README.md")
SECONDS_TO_ANSWER = 5.0

MISSING = "no such {} on the Hub that you can read; correct the name, or log in with `hf auth login`"
GATED = "the Hub gives this {} on request only; ask for it on its page, and log in with `hf auth login`"


def find_folder(name: str | Path, *patterns: str) -> Path:
    """The folder `name`, or the download of a Hub id's files that match `patterns` (default: a model's).

    Without a slash in any pattern, only of those at the top.

    A model that was downloaded before opens without network too.

    Raises:
        UserError: No such folder, and no Hub id whose files can be downloaded.
    """
    name = str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name}: a file, expected a folder or a Hub id")
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.parent.is_dir():  # not `runs/mid`
        raise UserError(f"{name}: no such folder; give an existing folder or a Hub id")
    return download(name, patterns or MODEL_FILES)


def download(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        model_info(name, timeout=SECONDS_TO_ANSWER)  # the download itself would wait forever for an answer
    except (HFValidationError, GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(f"{name}: no such folder, and {hub_failure(error)}") from error
    except Exception as error:  # the transport's errors differ between huggingface_hub 1.x and 2.x
        return cached_folder(name, patterns, error)
    try:
        if len(patterns) == 1 and "*" not in patterns[0]:  # in this thread, which Ctrl-C stops at once
            return Path(hf_hub_download(name, patterns[0])).parent
        ignored = None if any("/" in pattern for pattern in patterns) else ["*/*"]
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=ignored))
    except Exception as error:
        reason = hub_failure(error) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be downloaded: {reason}") from error


def cached_folder(name: str, patterns: tuple[str, ...], cause: Exception) -> Path:
    """The folder of an earlier download, which may be incomplete: the caller has to check."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except Exception:  # since huggingface_hub 2 also if an optional file is missing
        if isinstance(config := try_to_load_from_cache(name, "config.json"), str):
            return Path(config).parent
    raise UserError(f"{name}: no such folder, and {hub_failure(cause) or one_line(cause)}") from cause


@contextmanager
def progress_bars() -> Iterator[None]:
    """Show the Hub's progress bars within the block, on a terminal and unless the environment forbids it."""
    were_disabled = are_progress_bars_disabled()
    if were_disabled and sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    try:
        yield
    finally:
        if were_disabled:
            disable_progress_bars()


def hub_failure(error: BaseException, what: str = "model") -> str | None:
    """Why the Hub did not serve a `what`, and what to do; None if neither the Hub nor the network raised `error`."""
    return next((failure for one in reversed(causes(error)) if (failure := failure_of(one, what))), None)


def causes(error: BaseException) -> list[BaseException]:
    """`error` and what led to it, also what `from None` hides."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def failure_of(error: BaseException, what: str) -> str | None:
    if isinstance(error, HFValidationError):
        return "not a Hub id: letters, digits, `-`, `_` and `.` only"
    if isinstance(error, RepositoryNotFoundError):
        return (GATED if isinstance(error, GatedRepoError) else MISSING).format(what)
    if isinstance(error, HfHubHTTPError):
        return refusal(error.response.status_code, error)
    if constants.HF_HUB_OFFLINE and isinstance(error, ConnectionError):
        return "HF_HUB_OFFLINE forbids downloading it; unset the variable"
    # httpx's in huggingface_hub 1.x, httpx2's in 2.x
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    if transport or isinstance(error, ConnectionError) or str(error).startswith("Consistency check failed"):
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"the connection to the Hub failed ({reason}); check the network and run the same command again"
    return None


def refusal(status: int, error: HfHubHTTPError) -> str | None:
    """What an answer with this HTTP status means; None for a file that the repository lacks."""
    if status == 401:
        return "the Hub does not accept your token; log in with `hf auth login`"
    if status == 403:
        return f"the Hub forbids it ({one_line(error)}); log in with `hf auth login` to an account that may"
    if status == 429:
        return "the Hub limits your requests; log in with `hf auth login`, or run the same command again later"
    if status >= 500:
        return f"the Hub had an internal error (status {status}); run the same command again later"
    return None if status == 404 else f"the Hub refused ({one_line(error)}); correct the name, or try again later"
