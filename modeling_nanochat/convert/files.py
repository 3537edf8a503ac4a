"""Reading of a conversion's input: the original's `.pt` and meta files, and the parts of a model folder."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

from .. import registered  # noqa: F401  registers both architectures
from ..errors import UserError, one_line
from .config import OriginalConfig


def steps(folder: Path) -> list[int]:
    """Steps for which `folder` has weights or a meta file, sorted."""
    found = (re.fullmatch(r"(?:model_(\d{6,})\.pt|meta_(\d{6,})\.json)", path.name) for path in folder.iterdir())
    return sorted({int(match[1] or match[2]) for match in found if match})


def pick_step(folder: Path, step: int | None) -> int:
    there = steps(folder)
    if not there:
        raise UserError(
            f"{folder}: has no model_<step>.pt, so it is not a checkpoint of the original; give the folder with it"
        )
    if step is not None and step not in there:
        raise UserError(f"{folder}: has no step {step}, only {', '.join(map(str, there))}")
    return there[-1] if step is None else step


def read_meta(path: Path) -> OriginalConfig:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: missing; it holds the sizes of the weights beside it, copy both") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again") from error
    try:
        return OriginalConfig.from_dict(meta.get("model_config") if isinstance(meta, dict) else None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`, on the CPU, memory-mapped if possible. Only tensors are unpickled."""
    if not path.is_file():
        raise UserError("missing; copy it to where its meta file is")
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged and hostile files fail in any way, and torch then advises unpickling them
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"refused, because it is damaged or holds more than tensors ({reason})") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in content.items()
    ):
        raise UserError("holds something other than named tensors, so it is not a model of the original")
    return {name: tensor.detach() for name, tensor in content.items()}


def read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind: a key of the wrong type fails wherever it is used
        raise UserError(f"config.json cannot be opened: {one_line(error)}") from error


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder, each in its dtype on disk."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError("has no model.safetensors")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights cannot be opened: {error}") from error
