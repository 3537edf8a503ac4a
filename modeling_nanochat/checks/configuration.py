"""Whether config.json describes a model as large as the weights: found out before anything of that size is built."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from ..configuration_nanochat import NanoChatConfig
from ..errors import UserError, one_line
from ..sizes import parameter_counts
from .files import MAX_TENSORS, WEIGHTS, read_json, weight_files

MAX_HEADER_BYTES = 2**24  # of a safetensors file
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Keys whose value is a number of objects, which are built one after the other.
COUNT = re.compile(r"(^|_)(n_)?(layers?|blocks|labels|experts|depth)$")
FEWEST = 1000  # so many are built in a second, whatever the weights are
SPARE_NUMBERS = 2**24  # buffers that a model computes instead of storing them
POSITIVE = ("max_position_embeddings", "final_logit_softcapping")


def check_config(folder: Path, name: str) -> None:
    """Raise [`UserError`] if config.json asks for foreign code, or for a larger model than the weights in `folder`."""
    config = read_json(folder / "config.json", name)
    if "transformers_weights" in config:  # transformers reads that file instead
        raise UserError(
            f"{name}: config.json has `transformers_weights`; rename the file to {WEIGHTS}, remove the key"
        )
    if "quantization_config" in config:  # some of its methods download kernels
        raise UserError(f"{name}: config.json has `quantization_config`; save the model without quantization")
    tensors, numbers = stored(folder, name)
    for key, value in entries(config):
        if key.endswith("_implementation") and "/" in str(value):  # names of kernels that transformers would download
            raise UserError(f"{name}: config.json has `{key}`, which runs code from the Hub; remove the key")
        if problem := problem_of(key, value, tensors):
            raise UserError(f"{name}: config.json: {key} {problem}; copy config.json and weights from one training")
    built = numbers_built(folder, name)
    if built > 2 * numbers + SPARE_NUMBERS:  # twice: a tied head may be stored once
        raise UserError(
            f"{name}: the weights do not belong to config.json: they have {numbers:,} numbers, a model of these sizes "
            f"{built:,}; copy both from one training"
        )


def problem_of(key: str, value: Any, tensors: int) -> str | None:
    """What is wrong with an entry of config.json, whatever the architecture; None if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, not a finite number"
    if not isinstance(value, int | float):
        return None
    if COUNT.search(key) and value > max(tensors, FEWEST):
        return f"is {value}, the weights are {tensors} tensors"
    if (key in POSITIVE and value <= 0) or (key.endswith("_eps") and value < 0):
        return f"is {value}, too small"
    if key.endswith("dropout") and not 0 <= value <= 1:
        return f"is {value}, not from 0 to 1"
    return None


def entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and value in an object of JSON; the items of a list have the list's key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name, item
            yield from entries(item, name)
    elif isinstance(value, list):
        for item in value:
            yield key, item
            yield from entries(item, key)


def stored(folder: Path, name: str) -> tuple[int, int]:
    """Tensors and numbers in the folder's weights, from the headers of the files."""
    shapes = [shape for path in weight_files(folder, name) for shape in header(path, name)]
    if len(shapes) > MAX_TENSORS:
        raise UserError(f"{name}: the weights are {len(shapes):,} tensors, at most {MAX_TENSORS:,} are opened")
    return len(shapes), sum(map(math.prod, shapes))


def header(path: Path, name: str) -> list[list[int]]:
    """The shape of each tensor in a safetensors file.

    Raises:
        UserError: The file is damaged, or a tensor is not of floating-point numbers.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{name}: {path.name} cannot be opened: its header has {length:,} bytes; copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            kinds = {key: part.get_dtype() for key, part in slices.items()}
            shapes = [part.get_shape() for part in slices.values()]
    except Exception as error:  # SafetensorError for damage, others for kinds that torch does not know
        raise UserError(f"{name}: {path.name} cannot be opened: {one_line(error)}; copy it again") from error
    if wrong := next((key for key, kind in kinds.items() if kind not in FLOATING), None):
        raise UserError(f"{name}: {path.name}: {wrong} is {kinds[wrong]}, not floating-point; save the model again")
    return shapes


def numbers_built(folder: Path, name: str) -> int:
    """Numbers in the model that config.json describes: computed for this project's, otherwise built without memory."""
    try:
        with errors_only(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if isinstance(config, NanoChatConfig):
                return parameter_counts(config)["total"]
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any kind: an invalid configuration fails wherever it is used
        raise UserError(f"{name}: config.json cannot be opened: {one_line(error)}") from error
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence transformers' warnings within the block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
