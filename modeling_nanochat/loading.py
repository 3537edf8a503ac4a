"""Open a model folder or Hub id, checked first so that a fault is reported in one line.

Weights are read only from safetensors inside the folder, and code in a checkpoint is never run. What `checks` refuses
would take unbounded time or memory.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from . import registered  # noqa: F401  registers both architectures
from .checks.configuration import check_config, errors_only
from .checks.files import check_model_files
from .checks.tokenizer import check_token_ids, check_tokenizer, load_tokenizer
from .convert.cached import model_folder
from .errors import UserError, one_line


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
        name_or_path: A folder in Hub layout, or a Hub id such as `me/nanochat`; a checkpoint of the original by
            either name is converted once.
        dtype: Default: see `default_dtype`.
        device: Default: `pick_device()`.

    Raises:
        UserError: No such folder or Hub id; config, safetensors or tokenizer are missing, too large or do not match; a
            weight is not finite.
    """
    device = torch.device(device) if device is not None else pick_device()
    dtype = default_dtype(device) if dtype is None else dtype
    name = str(name_or_path)
    folder = model_folder(name)
    check_model_files(folder, name)
    check_config(folder, name)
    tokenizer = load_tokenizer(folder, name)
    model = load_model(folder, name, dtype)
    check_token_ids(tokenizer, model.config, name)
    model = model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` without its types
    if broken := first_not_finite(model):
        raise UserError(
            f"{name}: {broken} has values that are not finite; the training diverged, take another checkpoint"
        )
    return model, tokenizer


def check_folder(folder: Path, name: str) -> None:
    """Raise [`UserError`] for a folder that is incomplete, or that could not be opened in bounded time and memory."""
    check_model_files(folder, name)
    check_config(folder, name)
    check_tokenizer(folder, name)


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
