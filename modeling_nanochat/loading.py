"""Open a model folder or Hub id, checked first so that a fault is reported in one line.

Weights are read only from safetensors inside the folder, and code in a checkpoint is never run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from . import registered  # noqa: F401  registers both architectures
from .errors import UserError
from .hub import find_folder

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ATTENTION = ("attn_implementation", "_attn_implementation")  # names of kernels that transformers would download
MERGE = "AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')"


def pick_device() -> torch.device:
    """CUDA if available, then Apple's MPS, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype | str:
    """float32 on a CPU; bfloat16 on CUDA devices with hardware support; elsewhere "auto", the checkpoint's dtype.

    Training saves float32, in which a GPU is several times slower and reads twice the bytes for each token.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else "auto"


def load_model_and_tokenizer(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Open a causal language model and its tokenizer, in evaluation mode.

    Args:
        name_or_path: A folder in Hub layout, or a Hub id such as `me/nanochat`.
        dtype: Default: see `default_dtype`.
        device: Default: `pick_device()`.

    Raises:
        UserError: No such folder or Hub id; config, safetensors or tokenizer are missing or do not match; a weight is
            not finite.
    """
    device = torch.device(device) if device is not None else pick_device()
    dtype = default_dtype(device) if dtype is None else dtype
    name = str(name_or_path)
    folder = find_folder(name)
    check_folder(folder, name)
    tokenizer = load_tokenizer(folder, name)
    model = load_model(folder, name, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
            "they are not from the same training, copy the right tokenizer into the folder"
        )
    model = model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` without its types
    if broken := first_not_finite(model):
        raise UserError(
            f"{name}: {broken} has values that are not finite; the training diverged, take another checkpoint"
        )
    return model, tokenizer


def check_folder(folder: Path, name: str) -> None:
    """Raise [`UserError`] for a folder that is incomplete, or whose weights are elsewhere or pickled."""
    if (folder / "adapter_config.json").is_file():  # transformers would open the base model that it names
        raise UserError(
            f"{name}: a PEFT adapter, not a full model; merge it into its base model with peft's "
            f"{MERGE.format(name=name)}, copy the tokenizer's files into `merged` and give that"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: has no config.json, so it is not a model folder; did the training stage finish?")
    config = read_json(folder / "config.json", name)
    if "transformers_weights" in config:  # transformers reads that file instead
        raise UserError(
            f"{name}: config.json has `transformers_weights`; rename the file to {WEIGHTS}, remove the key"
        )
    if kernel := next((key for key in ATTENTION if "/" in str(config.get(key))), None):
        raise UserError(f"{name}: config.json has `{kernel}`, which runs code from the Hub; remove the key")
    if not (folder / WEIGHTS).is_file():
        check_shards(folder, name)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{name}: has no tokenizer.json; copy the tokenizer folder that the model was trained with into it"
        )


def check_shards(folder: Path, name: str) -> None:
    """Raise [`UserError`] unless the index names only safetensors that exist in this folder.

    transformers would open any path it names, pickles included. Links are followed: the Hub's cache consists of them.
    """
    if not (folder / WEIGHTS_INDEX).is_file():
        pickled = " (pickled weights are not opened, convert them)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{name}: has no {WEIGHTS}{pickled}; did the training stage finish, or the download?")
    shards = read_json(folder / WEIGHTS_INDEX, name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{name}: {WEIGHTS_INDEX} has no `weight_map`; save the model again")
    for shard in sorted({str(shard) for shard in shards.values()}):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(f"{name}: {WEIGHTS_INDEX} names {shard!r}; only safetensors inside the folder are opened")
        if not (folder / shard).is_file():
            raise UserError(f"{name}: has no {shard}, which {WEIGHTS_INDEX} names; copy or download the folder again")


def read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {path.name} cannot be opened: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: {path.name} cannot be opened: not a JSON object")
    return content


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer in `folder`; errors refer to it as `name`."""
    try:
        with errors_only():  # it reads config.json and warns about what `load_model` refuses
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind: tokenizers raises bare `Exception`s
        raise UserError(f"{name}: the tokenizer cannot be opened: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name}: {type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json")
    return tokenizer


def load_model(folder: Path, name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        with errors_only():  # hides transformers' table of mismatches, which calls random weights `OK`
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below
                output_loading_info=True,
            )
    except Exception as error:  # of any kind: an invalid configuration fails wherever it is used
        raise UserError(f"{name}: the model cannot be opened: {one_line(error)}") from error
    model, loading = opened
    if mismatch := weight_mismatch(loading):
        raise UserError(f"{name}: the weights do not belong to config.json: {mismatch}; copy both from one training")
    return model


def weight_mismatch(loading: dict[str, Any]) -> str | None:
    """The first mismatch between the weights and config.json, from `from_pretrained`'s loading info."""
    for key, in_weights, by_config in sorted(loading["mismatched_keys"]):
        return f"{key} is {tuple(in_weights)}, config.json says {tuple(by_config)}"
    for keys, what in [("missing_keys", "they lack"), ("unexpected_keys", "config.json has no place for")]:
        if found := sorted(loading[keys]):
            return f"{what} {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    return None


@torch.no_grad()
def first_not_finite(model: PreTrainedModel) -> str | None:
    """Name of the first weight or buffer that contains NaN or infinity.

    One number per tensor and a single transfer: a sum is not finite if any addend is not. A sum of huge addends
    may not be finite either, so its tensor is checked again.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: tensor for name, tensor in named if tensor.is_floating_point() and tensor.itemsize > 1}
    if not tensors:
        return None
    finite = torch.stack([tensor.sum().float() for tensor in tensors.values()]).isfinite().tolist()
    suspects = (name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite)
    return next((name for name in suspects if not tensors[name].isfinite().all()), None)


def one_line(error: Exception) -> str:
    return shorten(str(error).strip() or type(error).__name__, 300, placeholder=" ...")


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence transformers' warnings within the block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
