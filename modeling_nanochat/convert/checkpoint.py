"""Conversion of the original's state dicts to ours and back: names, shapes, vocabulary padding.

Two layouts have an architecture here: the launch layout is plain, the current one is turbo. A layout between the two
(residual scales without smear, windows on launch weights) has none, and is refused rather than converted to something
with other logits. Everything here works on dictionaries; `files.py` and `__main__.py` read and write the files.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..modeling_nanochat_turbo import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS
from .config import Architecture, OriginalConfig, join_names

VOCABULARY_MULTIPLE = 64
COMPILED_PREFIX = "_orig_mod."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """Our counterpart of an original tensor: name, shape without padding, whether its rows are the vocabulary."""

    name: str
    shape: tuple[int, ...]
    by_vocabulary: bool = False


def plain_places(sizes: OriginalConfig) -> dict[str, Place]:
    """Original name -> place, for the tensors of both layouts. Nothing is transposed."""
    width, values = sizes.n_embd, sizes.n_embd // sizes.n_head * sizes.n_kv_head
    places = {
        "transformer.wte.weight": Place("model.embed_tokens.weight", (sizes.vocab_size, width), True),
        "lm_head.weight": Place("lm_head.weight", (sizes.vocab_size, width), True),
    }
    for i in range(sizes.n_layer):
        original, ours = f"transformer.h.{i}.", f"model.layers.{i}."
        places |= {
            f"{original}attn.c_q.weight": Place(f"{ours}self_attn.q_proj.weight", (width, width)),
            f"{original}attn.c_k.weight": Place(f"{ours}self_attn.k_proj.weight", (values, width)),
            f"{original}attn.c_v.weight": Place(f"{ours}self_attn.v_proj.weight", (values, width)),
            f"{original}attn.c_proj.weight": Place(f"{ours}self_attn.o_proj.weight", (width, width)),
            f"{original}mlp.c_fc.weight": Place(f"{ours}mlp.fc1.weight", (4 * width, width)),
            f"{original}mlp.c_proj.weight": Place(f"{ours}mlp.fc2.weight", (width, 4 * width)),
        }
    return places


def turbo_places(sizes: OriginalConfig) -> dict[str, Place]:
    """Original name -> place, for the tensors of the current layout alone."""
    values = sizes.n_embd // sizes.n_head * sizes.n_kv_head
    places = {
        "resid_lambdas": Place("model.resid_lambdas", (sizes.n_layer,)),
        "x0_lambdas": Place("model.x0_lambdas", (sizes.n_layer,)),
        "smear_gate.weight": Place("model.smear_gate.weight", (1, SMEAR_GATE_CHANNELS)),
        "smear_lambda": Place("model.smear_lambda", (1,)),
        "backout_lambda": Place("model.backout_lambda", (1,)),
    }
    for i in range((sizes.n_layer - 1) % 2, sizes.n_layer, 2):
        places[f"value_embeds.{i}.weight"] = Place(f"model.value_embeds.{i}.weight", (sizes.vocab_size, values), True)
        places[f"transformer.h.{i}.attn.ve_gate.weight"] = Place(
            f"model.layers.{i}.self_attn.ve_gate.weight", (sizes.n_kv_head, VALUE_GATE_CHANNELS)
        )
    return places


def all_places(sizes: OriginalConfig, architecture: Architecture) -> dict[str, Place]:
    return plain_places(sizes) | (turbo_places(sizes) if architecture == "turbo" else {})


def without_compiled_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the name prefix of a compiled model."""
    stripped = {name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in state_dict.items()}
    if len(stripped) < len(state_dict):
        raise UserError(f"holds tensors twice, with and without {COMPILED_PREFIX}; save one of them")
    return stripped


def recognise(names: Iterable[str], sizes: OriginalConfig) -> Architecture:
    """The architecture of an original state dict, detected from its tensors' names.

    Raises:
        UserError: It is neither the launch nor the current layout; the message lists the names that do not fit.
    """
    names = set(names)
    layers = {match[1] for name in names if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    if len(layers) != sizes.n_layer:  # first, so that the meta file alone never sizes the tables below
        raise UserError(f"the weights have {len(layers)} layers, model_config says {sizes.n_layer}")
    plain, turbo = set(plain_places(sizes)), set(turbo_places(sizes))
    misfits = {"unknown": names - plain - turbo, "missing": plain - names}
    if found := names & turbo:
        misfits["missing"] |= turbo - names
    if found and misfits["missing"] & turbo:
        misfits["found beside"] = found
    if any(misfits.values()):
        details = "; ".join(f"{what}: {join_names(sorted(which))}" for what, which in misfits.items() if which)
        raise UserError(
            f"neither the launch nor the current layout, so no architecture here gives its logits ({details})"
        )
    return "turbo" if found else "plain"


def state_dict_from_original(
    state_dict: Mapping[str, torch.Tensor], sizes: OriginalConfig
) -> tuple[dict[str, torch.Tensor], Architecture]:
    """An original state dict under our names, without vocabulary padding; and its architecture.

    The tensors are the given ones or views of them, in their own dtype.

    Raises:
        UserError: Unknown, missing, misshapen or non-float tensors, or a layout between launch and current.
    """
    state_dict = without_compiled_prefix(state_dict)
    architecture = recognise(state_dict, sizes)
    places = all_places(sizes, architecture)
    for name, place in places.items():
        check_tensor(name, state_dict[name], place, padded(sizes.vocab_size))
    return {place.name: state_dict[name][: place.shape[0]] for name, place in places.items()}, architecture


def check_tensor(name: str, tensor: torch.Tensor, place: Place, padded_rows: int | None = None) -> None:
    """Raise [`UserError`] unless shape and dtype fit; a table of the vocabulary may have `padded_rows` instead."""
    shapes = [place.shape]
    if place.by_vocabulary and padded_rows:
        shapes.append((padded_rows, *place.shape[1:]))
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, the sizes require {wanted}")
    if tensor.dtype not in DTYPES:
        raise UserError(f"{name} is {dtype_name(tensor.dtype)}, expected float32 or bfloat16")


def state_dict_to_original(
    state_dict: Mapping[str, torch.Tensor], sizes: OriginalConfig, architecture: Architecture
) -> dict[str, torch.Tensor]:
    """Our state dict under the original's names: launch layout for plain, current layout for turbo.

    The current layout is padded with zero rows to a multiple of 64, as that code expects; it never reads them.
    The launch layout has no padding.

    Raises:
        UserError: Unknown, missing, misshapen or non-float tensors.
    """
    places = all_places(sizes, architecture)
    names = {place.name for place in places.values()}
    if misfits := sorted(names ^ set(state_dict)):
        raise UserError(f"the weights do not fit config.json: {join_names(misfits)} missing or unexpected")
    converted = {}
    for name, place in places.items():
        check_tensor(place.name, state_dict[place.name], place)
        pad = padded(sizes.vocab_size) - sizes.vocab_size if place.by_vocabulary and architecture == "turbo" else 0
        converted[name] = F.pad(state_dict[place.name], (0, 0, 0, pad)) if pad else state_dict[place.name]
    return bfloat16_tables(converted, places)


def bfloat16_tables(state_dict: dict[str, torch.Tensor], places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """Embedding tables in bfloat16 if that is lossless: the original stores them so, and a round trip is identical."""
    tables = [name for name, place in places.items() if place.by_vocabulary and name != "lm_head.weight"]
    rounded = {name: state_dict[name].bfloat16() for name in tables}
    exact = all(torch.equal(rounded[name].to(state_dict[name].dtype), state_dict[name]) for name in tables)
    return state_dict | rounded if exact else state_dict


def padded(vocab_size: int) -> int:
    """Rows of the original's padded table for `vocab_size` entries."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def refuse_loss(names: Iterable[str]) -> None:
    """Raise [`UserError`] that lists all tensors of turbo for which plain has no place."""
    raise UserError(
        "turbo cannot become plain: windows, q/k scale and rotary base differ, and these tensors would be lost: "
        + ", ".join(names)
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
