"""The files of one checkpoint: written, flushed to disk and hashed; listed in a marker; verified by it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_nanochat.folders import flush

MARKER = "complete.json"


class Damaged(Exception):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies in CPU memory, which later training steps do not change."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def write_files(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: str | None) -> dict:
    """Write and flush this process's files; returns name -> size and SHA-256."""
    written = {}
    for name, content in tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(content, path)
        written[path.name] = path
    if state is not None:
        write_text(folder / "state.json", state)
        written["state.json"] = folder / "state.json"
    for path in written.values():
        flush(path)
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in written.items()}


def write_marker(folder: Path, files: dict[str, dict]) -> None:
    """List `files`, the results of [`write_files`] of all processes: from now on the folder can be verified."""
    write_text(folder / MARKER, json.dumps({"files": files}, indent=1))
    flush(folder)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush(path)


def verify(folder: Path, only: str | None = None) -> None:
    """Raise [`Damaged`] unless every file is there and unchanged; with `only`, that file."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise Damaged(f"{MARKER} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MARKER} is not readable") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if only not in (None, name):
            continue
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if sha256(path) != digest:
            raise Damaged(f"{name} has changed since it was written")
    for name in ("state.json", "model.safetensors"):
        if name not in expected:
            raise Damaged(f"{MARKER} does not list {name}")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
