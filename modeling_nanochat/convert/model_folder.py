"""A checkpoint of the original as a model folder: weights, tokenizer, chat template, generation settings, card."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import NanoChatForCausalLM, NanoChatTurboForCausalLM
from ..checks.tokenizer import load_tokenizer
from ..configuration_nanochat import NanoChatConfig
from ..errors import UserError, one_line
from ..folders import atomic_directory
from ..hub import find_folder, progress_bars
from ..tokenization_nanochat import save_tokenizer, set_special_tokens, special_token_ids
from .checkpoint import dtype_name, refuse_loss, state_dict_from_original, turbo_places
from .config import Architecture, OriginalConfig, config_from_original
from .files import pick_step, read_meta, read_tensors
from .pickled_tokenizer import load_pickled_tokenizer

SMALL_FILES = ("config.json", "meta_*.json", "tokenizer*", "special_tokens_map.json", "*.jinja")
TOKENIZERS = ("tokenizer.json", "tokenizer.pkl")
CHAT_TEMPLATE = Path(__file__).parents[1] / "chat_template.jinja"

CARD = """{metadata}

# {name}

{parameters:,} parameters, {architecture} architecture, converted from step {step} of a checkpoint (`{source}`) of the
original [nanochat](https://github.com/karpathy/nanochat); the weights are in {dtype}."""


@progress_bars()
def write_model_folder(
    source: str,
    target: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    allow_turbo: bool = True,
) -> str:
    """Convert a checkpoint of the original; returns its architecture, step and size in words.

    Args:
        source: Folder or Hub id; of the latter, only what is needed is downloaded.
        target: Folder to write or to replace.
        step: None: the largest.
        tokenizer: Folder or Hub id; None: see `tokenizer_place`.
        dtype: See `pick_dtype`.
        allow_turbo: Whether the current layout is accepted.

    Raises:
        UserError: Checkpoint, tokenizer or settings do not match, or the disk is full; `target` is as it was.
    """
    folder = find_folder(source, *SMALL_FILES)
    step = pick_step(folder, step)
    sizes = read_meta(folder / f"meta_{step:06d}.json")
    path = find_folder(source, f"model_{step:06d}.pt") / f"model_{step:06d}.pt"
    try:
        state_dict, architecture = state_dict_from_original(read_tensors(path), sizes)
        config = config_from_original(sizes, architecture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if architecture == "turbo" and not allow_turbo:
        refuse_loss(turbo_places(sizes))
    if architecture == "turbo" and sizes.window_pattern is None:
        print(
            "note: the meta file has no window_pattern; as in the original, every layer sees the full context",
            file=sys.stderr,
        )
    opened = open_tokenizer(tokenizer or str(find_tokenizer(source, folder)), sizes)
    weights = {name: tensor.to(pick_dtype(dtype, state_dict)) for name, tensor in state_dict.items()}
    model = build_model(config, weights, opened)
    try:
        with atomic_directory(target) as unfinished:
            with writing_bar(unfinished, sum(tensor.nbytes for tensor in weights.values())):
                model.save_pretrained(unfinished)
            save_tokenizer(opened, unfinished)
            card = model_card(Path(target).name, source, model, architecture, step)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written: {one_line(error)}; free disk space or permit it") from error
    return f"{architecture}, step {step}, {model.num_parameters():,} parameters in {dtype_name(model.dtype)}"


def tokenizer_place(folder: Path) -> Path | None:
    """The folder with a checkpoint's tokenizer: its own, one in it, or the one next to the original's checkpoints."""
    places = (folder, folder / "tokenizer", folder.resolve().parent.parent / "tokenizer")
    return next((place for place in places if any((place / file).is_file() for file in TOKENIZERS)), None)


def find_tokenizer(source: str, folder: Path) -> Path:
    """The folder of the tokenizer of `source`, whose top-level files are in `folder`."""
    in_folder = [f"tokenizer/{file}" for file in TOKENIZERS]
    place = tokenizer_place(folder) or tokenizer_place(find_folder(source, *in_folder))
    if place is None:
        raise UserError(
            f"{source}: no tokenizer.json or tokenizer.pkl; copy the model's tokenizer into the folder, or give it to "
            "nanochat-convert with --tokenizer; a model is useless without it"
        )
    return place


def open_tokenizer(name: str, sizes: OriginalConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, given the chat template if it has none; checked against the model's vocabulary."""
    place = Path(name).expanduser()
    if place.is_dir() and not (place / "tokenizer.json").is_file():
        tokenizer = load_pickled_tokenizer(place / "tokenizer.pkl", sizes.sequence_len)
    else:
        tokenizer = load_tokenizer(find_folder(name), name)
    try:
        special_token_ids(tokenizer)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if len(tokenizer) != sizes.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {sizes.vocab_size}; "
            "they are not from the same training; give nanochat-convert the right one with --tokenizer"
        )
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def pick_dtype(name: str, state_dict: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype `name`; for `auto` float32, which represents the original's float32 and bfloat16 tensors exactly."""
    if name != "auto":
        return getattr(torch, name)
    only_bfloat16 = all(tensor.dtype == torch.bfloat16 for tensor in state_dict.values())
    return torch.bfloat16 if only_bfloat16 else torch.float32


def build_model(
    config: NanoChatConfig, state_dict: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A model that uses the given tensors without copying them."""
    model_class = NanoChatForCausalLM if config.model_type == "nanochat" else NanoChatTurboForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state_dict, assign=True)
    set_special_tokens(model, tokenizer)
    return model


@contextmanager
def writing_bar(folder: Path, total: int) -> Iterator[None]:
    """Show on a terminal how many of `total` bytes are in `folder`, while the block writes them in a single call."""
    finished = threading.Event()

    def watch(bar: Any) -> None:
        while not finished.wait(0.2):
            bar.update(sum(path.stat().st_size for path in folder.iterdir()) - bar.n)

    with tqdm(desc="converting", total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


def model_card(name: str, source: str, model: PreTrainedModel, architecture: Architecture, step: int) -> str:
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["nanochat"])
    is_path = Path(source).expanduser().exists()
    card = CARD.format(
        metadata=f"---\n{data.to_yaml()}\n---",
        name=name,
        parameters=model.num_parameters(),
        architecture=architecture,
        dtype=dtype_name(model.dtype),
        step=step,
        source=Path(source).name if is_path else source,
    )
    return card + "\n"
