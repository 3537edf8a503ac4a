"""Atomic folders and files: written under a temporary name, flushed to disk, then renamed."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` atomically, indented; numbers must be finite."""
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object per line, atomically; numbers must be finite."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def atomic_write(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8, so that readers never see a partial file; missing folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
