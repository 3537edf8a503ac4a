"""Folders that are whole or absent: filled under another name, flushed to disk, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
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
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if target.exists():
        target.rename(discarded)
    unfinished.rename(target)
    shutil.rmtree(discarded, ignore_errors=True)
    flush(target.parent)


def settle(target: str | Path) -> bool:
    """Clear up after a process that was killed within [`whole_folder`].

    Returns:
        Whether the folder that was being filled, if any, is now the one at `target`; False if it had to be removed.
    """
    target = Path(target)
    unfinished, discarded = unfinished_and_discarded(target)
    if discarded.exists() and not target.exists():  # killed between the two renames: the new one is whole
        (unfinished if unfinished.exists() else discarded).rename(target)
    settled = not unfinished.exists()
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(discarded, ignore_errors=True)
    return settled


def unfinished_and_discarded(target: Path) -> tuple[Path, Path]:
    """Where a folder is while it is filled, and where the one is that it has replaced."""
    return target.parent / f".{target.name}.unfinished", target.parent / f".{target.name}.old"


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
