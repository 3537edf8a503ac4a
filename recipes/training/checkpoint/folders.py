"""The folders of a stage's checkpoints, by name. Imports no torch: a ladder with nothing to do runs without it."""

import re
import shutil
from contextlib import suppress
from pathlib import Path


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder of a stage's checkpoints, valid or not, oldest first."""
    found = [(re.fullmatch(r"step-(\d{8})", path.name), path) for path in folder.glob("step-*")]
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def discard(folder: Path, only_leftovers: bool = False) -> None:
    """Delete a stage's checkpoints atomically: a kill during deletion must not leave folders that look damaged.

    Leftovers of such a kill are deleted too; with `only_leftovers`, nothing else is.
    """
    discarded = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(discarded, ignore_errors=True)
    if folder.exists() and not only_leftovers:
        folder.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    with suppress(OSError):  # not empty: it holds another stage's
        folder.parent.rmdir()
