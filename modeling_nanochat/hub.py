"""Resolve a model name to a folder: a local folder, or the download of a Hub id's model files."""

from pathlib import Path

from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from .errors import UserError

# The files of a model folder. No subfolders, code or pickles: none of them is ever opened.
MODEL_FILES = ("*.json", "*.jinja", "model*.safetensors", "README.md")
SECONDS_TO_ANSWER = 5.0


def find_folder(name: str | Path, *patterns: str) -> Path:
    """The folder `name`, or the download of a Hub id's top-level files that match `patterns` (default: model files).

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
    except HFValidationError as error:
        raise UserError(f"{name}: no such folder, and not a Hub id: letters, digits, `-`, `_` and `.` only") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{name}: no such folder, and no such model on the Hub that you can read; correct the name, or log in "
            "with `hf auth login`"
        ) from error
    except Exception as error:  # the transport's errors differ between huggingface_hub 1.x and 2.x
        return cached_folder(name, patterns, error)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: the download from the Hub failed: {reason}") from error


def cached_folder(name: str, patterns: tuple[str, ...], cause: Exception) -> Path:
    """The folder of an earlier download, which may be incomplete: the caller has to check."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except Exception:  # since huggingface_hub 2 also if an optional file is missing
        if isinstance(config := try_to_load_from_cache(name, "config.json"), str):
            return Path(config).parent
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE forbids downloading it; unset the variable"
    else:
        why = f"the Hub cannot be reached to download it ({type(cause).__name__}); check the network"
    raise UserError(f"{name}: no such folder, and {why}, or give a folder") from cause
