"""Opening a model folder or Hub id: checked first, so that what is wrong with it is told in one line.

Weights are read from safetensors only, and no code that a checkpoint carries is run.
"""

from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, HFValidationError)


def pick_device() -> torch.device:
    """CUDA where there is one, then Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_model_and_tokenizer(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a causal language model and its tokenizer, in evaluation mode.

    Args:
        name_or_path: A folder in Hub layout, or a Hub id such as `me/nanochat`.
        dtype: Default: float32 on a CPU, the checkpoint's own elsewhere.
        device: Default: `pick_device()`.

    Raises:
        UserError: No such folder or Hub id; config, safetensors or tokenizer are missing or do not fit together.
    """
    device = torch.device(device) if device is not None else pick_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    name = str(name_or_path)
    check_exists(name)
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
            "they are not from the same training, copy the right tokenizer into the folder"
        )
    return model.to(device).eval(), tokenizer


def check_exists(name: str) -> None:
    """Raise [`UserError`] for a folder that is missing or lacks a part; a Hub id is left to the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
    elif folder.exists():
        raise UserError(f"{name}: a file, expected a model folder or a Hub id")
    elif name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.parent.is_dir():  # `runs/mid` is no Hub id
        raise UserError(f"{name}: no such folder; give a model folder that a training stage wrote, or a Hub id")


def check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so it is no model folder; did the training stage finish?")
    if not any((folder / name).is_file() for name in WEIGHTS):
        pickled = " (pickled weights are not opened, convert them)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{folder}: has no model.safetensors{pickled}; did the training stage finish?")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: has no tokenizer.json; copy the tokenizer folder that the model was trained with into it"
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise unreadable(name, "tokenizer", error) from error


def load_model(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise unreadable(name, "model", error) from error
    # transformers fills absent weights with random numbers and only warns
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{name}: model.safetensors lacks {missing[0]} and {len(missing) - 1} more of config.json's weights"
        )
    return model


def unreadable(name: str, part: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    if Path(name).is_dir():
        return UserError(f"{name}: the {part} cannot be opened: {reason}")
    return UserError(f"{name}: no such folder, and no {part} of that id could be had from the Hub: {reason}")
