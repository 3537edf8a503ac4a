"""From a name to a folder: the folder itself, or a download of what belongs to a model with that Hub id."""

from pathlib import Path

from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from .errors import UserError

# What a model folder consists of. Nothing from subfolders, no code, no pickle: none of it is ever opened.
MODEL_FILES = ("*.json", "*.jinja", "model*.safetensors", "README.md")
SECONDS_TO_ANSWER = 5.0


def find_folder(name: str | Path, *patterns: str) -> Path:
    """The folder `name`, or the download of a Hub id's top-level files that match `patterns` (default: a model's).

    A model that was downloaded before is opened without network, too.

    Raises:
        UserError: No such folder, and no Hub id of which the files can be had.
    """
    name = str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name}: a file, expected a folder or a Hub id")
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.parent.is_dir():  # `runs/mid` is no Hub id
        raise UserError(f"{name}: no such folder; give one that is there, or a Hub id")
    return download(name, patterns or MODEL_FILES)


def download(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        model_info(name, timeout=SECONDS_TO_ANSWER)  # the download itself would wait without end for an answer
    except HFValidationError as error:
        raise UserError(f"{name}: no such folder, and not a Hub id: letters, digits, `-`, `_` and `.` only") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{name}: no such folder, and on the Hub no such model that you may read; correct the name, or log in with "
            "`hf auth login`"
        ) from error
    except Exception as error:  # the transport's errors differ between huggingface_hub 1.x and 2.x
        return cached_folder(name, patterns, error)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: the download from the Hub failed: {reason}") from error


def cached_folder(name: str, patterns: tuple[str, ...], cause: Exception) -> Path:
    """What an earlier download has left, which may be less than is needed: who opens it has to look."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except Exception:  # since huggingface_hub 2 also where a file is missing that the model may do without
        if isinstance(config := try_to_load_from_cache(name, "config.json"), str):
            return Path(config).parent
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE forbids to download it; unset the variable"
    else:
        why = f"the Hub cannot be reached to download it ({type(cause).__name__}); check the network"
    raise UserError(f"{name}: no such folder, and {why}, or give a folder") from cause
