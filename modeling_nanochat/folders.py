"""Folders that are whole or absent: filled under another name, flushed to disk, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the name `target` only when the block ends well and all of it is on disk."""
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
    """Clear up after a process that was killed within [`atomic_directory`].

    Returns:
        Whether the folder that was being filled, if any, is now the one at `target`; False if it had to be removed.
    """
    target = Path(target)
    unfinished, discarded = unfinished_and_discarded(target)
    if discarded.exists() and not target.exists():  # killed between the two renames: the new one is whole
        (unfinished if unfinished.exists() else discarded).rename(target)
    settled = not unfinished.exists()
    remove(unfinished)
    remove(discarded)
    return settled


def unfinished_and_discarded(target: Path) -> tuple[Path, Path]:
    """Where a folder is while it is filled, and where the one is that it has replaced."""
    return target.parent / f".{target.name}.unfinished", target.parent / f".{target.name}.old"


def remove(path: Path) -> None:
    """Remove a folder, or a link to one, if it is there and can be removed."""
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
