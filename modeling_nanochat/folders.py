"""Atomic folders: written under a temporary name, flushed to disk, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """A fresh folder to fill; renamed to `target` once the block has succeeded and everything is on disk."""
    target = Path(target)
    settle(target)
    unfinished, discarded = unfinished_and_discarded(target)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
    except BaseException:
        remove(unfinished)
        raise
    if target.exists():
        target.rename(discarded)
    unfinished.rename(target)
    remove(discarded)
    flush(target.parent)


def settle(target: str | Path) -> bool:
    """Clean up after a process that was killed inside [`atomic_directory`].

    Returns:
        False if an incomplete folder was removed; True otherwise, also if a complete one was renamed to `target`.
    """
    target = Path(target)
    unfinished, discarded = unfinished_and_discarded(target)
    if discarded.exists() and not target.exists():  # killed between the two renames: the new folder is complete
        (unfinished if unfinished.exists() else discarded).rename(target)
    settled = not unfinished.exists()
    remove(unfinished)
    remove(discarded)
    return settled


def unfinished_and_discarded(target: Path) -> tuple[Path, Path]:
    """Temporary names next to `target`: of the folder being filled, and of the folder it replaces."""
    return target.parent / f".{target.name}.unfinished", target.parent / f".{target.name}.old"


def remove(path: Path) -> None:
    """Remove a folder or a link to one; a folder that is missing or cannot be removed is ignored."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
