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
    unfinished = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    if target.exists():
        discarded = target.parent / f".{target.name}.old"
        shutil.rmtree(discarded, ignore_errors=True)
        target.rename(discarded)
        unfinished.rename(target)
        shutil.rmtree(discarded)
    else:
        unfinished.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
