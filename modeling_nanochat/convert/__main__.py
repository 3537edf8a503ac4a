"""Convert checkpoints of the original nanochat to model folders, and back.

    nanochat-convert --input ~/.cache/nanochat/chatsft_checkpoints/d20 --output_dir d20 \\
        --tokenizer ~/.cache/nanochat/tokenizer --allow_pickle

    nanochat-convert --input karpathy/nanochat-d32 --output_dir d32 --allow_pickle

    nanochat-convert --input runs/d20/sft --to original --output_dir back/d20

The layout of a checkpoint, launch or current, is detected from its tensors: launch becomes plain, current turbo.
Logits stay the same; models that neither architecture can compute, and conversions that lose a tensor, are refused.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import NanoChatForCausalLM, NanoChatTurboForCausalLM
from ..checks.configuration import check_config
from ..checks.files import check_files
from ..cli import parse
from ..configuration_nanochat import NanoChatConfig
from ..errors import UserError, exit_on_user_error
from ..folders import atomic_directory
from ..hub import find_folder
from ..loading import load_tokenizer
from ..tokenization_nanochat import save_tokenizer, set_special_tokens, special_token_ids
from .checkpoint import dtype_name, refuse_loss, state_dict_from_original, state_dict_to_original, turbo_places
from .config import Architecture, OriginalConfig, config_from_original, config_to_original
from .files import pick_step, read_config, read_meta, read_safetensors, read_tensors, steps
from .pickled_tokenizer import load_pickled_tokenizer

CHAT_TEMPLATE = Path(__file__).parents[1] / "chat_template.jinja"

CARD = """{metadata}

# {name}

{parameters:,} parameters, {architecture} architecture, converted from step {step} of a checkpoint (`{source}`) of the
original [nanochat](https://github.com/karpathy/nanochat); the weights are in {dtype}."""


@dataclass
class ConvertArguments:
    """What to convert, and to what."""

    input: str = field(
        metadata={
            "help": "Folder or Hub id: a checkpoint of the original (model_<step>.pt, meta_<step>.json) or a model."
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write."})
    to: Literal["hub", "plain", "original", "launch"] = field(
        default="hub",
        metadata={
            "help": "hub: model folder in the checkpoint's architecture; plain: the same, but refuse turbo; "
            "original: checkpoint in the original's layout; launch: the same, but refuse turbo."
        },
    )
    step: int | None = field(
        default=None,
        metadata={"help": "Step to read, the largest if empty; with --to original the step to write, 0 if empty."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Tokenizer folder or Hub id (default: the input); tokenizer.pkl is supported."},
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Open a pickled tokenizer; only from sources you trust."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of a model folder, float32 or bfloat16; auto: bfloat16 if all tensors are, else float32."
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an existing output_dir."})


def convert(args: ConvertArguments) -> None:
    """Run the conversion that the arguments describe.

    Raises:
        UserError: Input, tokenizer or settings do not match; nothing is written.
    """
    if Path(args.output_dir).exists() and not args.overwrite_output_dir:
        raise UserError(f"{args.output_dir} already exists; pass --overwrite_output_dir true or another --output_dir")
    if Path(args.input).expanduser().resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise UserError(f"{args.output_dir} contains the input, which would be replaced; give another --output_dir")
    if args.step is not None and args.step < 0:
        raise UserError(f"--step {args.step}: steps count from 0")
    if args.dtype not in ("auto", "float32", "bfloat16"):
        fp16 = "; the squared ReLU overflows in float16" if args.dtype in ("float16", "fp16", "half") else ""
        raise UserError(f"--dtype {args.dtype}: use float32 or bfloat16{fp16}")
    to_hub(args) if args.to in ("hub", "plain") else to_original(args)


def to_hub(args: ConvertArguments) -> None:
    """Original checkpoint -> model folder with tokenizer, template, generation settings and card."""
    folder = find_folder(args.input, "config.json", "meta_*.json", "tokenizer*", "special_tokens_map.json", "*.jinja")
    if not steps(folder) and (folder / "config.json").is_file():
        refuse_model_folder(args, folder)
    step = pick_step(folder, args.step)
    sizes = read_meta(folder / f"meta_{step:06d}.json")
    path = find_folder(args.input, f"model_{step:06d}.pt") / f"model_{step:06d}.pt"
    try:
        state_dict, architecture = state_dict_from_original(read_tensors(path), sizes)
        config = config_from_original(sizes, architecture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if args.to == "plain" and architecture == "turbo":
        refuse_loss(turbo_places(sizes))
    if architecture == "turbo" and sizes.window_pattern is None:
        print("note: the meta file has no window_pattern; as in the original, every layer sees the full context")
    tokenizer = open_tokenizer(args, folder, sizes)
    dtype = pick_dtype(args.dtype, state_dict)
    model = build_model(config, {name: tensor.to(dtype) for name, tensor in state_dict.items()}, tokenizer)
    with atomic_directory(args.output_dir) as target:
        model.save_pretrained(target)
        save_tokenizer(tokenizer, target)
        (target / "README.md").write_text(model_card(args, model, architecture, step), encoding="utf-8")
    size = f"{model.num_parameters():,} parameters in {dtype_name(model.dtype)}"
    print(f"{args.output_dir}: {architecture}, step {step}, {size}")


def to_original(args: ConvertArguments) -> None:
    """Model folder -> `model_<step>.pt` and `meta_<step>.json`: launch layout for plain, current layout for turbo."""
    folder = find_folder(args.input, "config.json", "*.safetensors", "*.safetensors.index.json")
    if not (folder / "config.json").is_file():
        what = "already a checkpoint of the original" if steps(folder) else "not a model folder, it has no config.json"
        raise UserError(f"{args.input}: {what}; --to {args.to} takes a model folder")
    check_files(folder, args.input)
    check_config(folder, args.input)
    try:
        sizes, architecture = config_to_original(read_config(folder))
        if args.to == "launch" and architecture == "turbo":
            refuse_loss(place.name for place in turbo_places(sizes).values())
        state_dict = state_dict_to_original(read_safetensors(folder), sizes, architecture)
    except UserError as error:
        raise UserError(f"{args.input}: {error}") from error
    step = args.step or 0
    meta = {"step": step, "model_config": sizes.to_dict()}
    with atomic_directory(args.output_dir) as target:
        torch.save(state_dict, target / f"model_{step:06d}.pt")
        (target / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    layout = "launch" if architecture == "plain" else "current"
    print(
        f"{args.output_dir}: step {step}, {layout} layout; the original also needs the tokenizer it was trained with"
    )


def refuse_model_folder(args: ConvertArguments, folder: Path) -> None:
    """Raise [`UserError`]: a model folder was given where a checkpoint of the original belongs."""
    try:
        sizes, architecture = config_to_original(read_config(folder))
    except UserError as error:
        raise UserError(f"{args.input}: {error}") from error
    if args.to == "plain" and architecture == "turbo":
        refuse_loss(place.name for place in turbo_places(sizes).values())
    raise UserError(f"{args.input}: already a model folder ({architecture}); --to original makes it a checkpoint")


def open_tokenizer(args: ConvertArguments, folder: Path, sizes: OriginalConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, given the chat template if it has none; checked against the model's vocabulary."""
    name = args.tokenizer or str(folder)
    place = Path(name).expanduser()
    pickled = place / "tokenizer.pkl"
    if place.is_dir() and not (place / "tokenizer.json").is_file():
        tokenizer = unpickle_tokenizer(pickled, args.allow_pickle, sizes.sequence_len)
    else:
        tokenizer = load_tokenizer(find_folder(name), name)
    try:
        special_token_ids(tokenizer)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if len(tokenizer) != sizes.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {sizes.vocab_size}; "
            "they are not from the same training, give the right one with --tokenizer"
        )
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def unpickle_tokenizer(path: Path, allowed: bool, model_max_length: int) -> PreTrainedTokenizerBase:
    if not path.is_file():
        raise UserError(
            f"{path.parent}: no tokenizer.json or tokenizer.pkl; give the model's tokenizer with --tokenizer, a model "
            "is useless without it"
        )
    if not allowed:
        raise UserError(
            f"{path}: unpickling can run code; pass --allow_pickle true if you trust its source, or give a folder "
            "with tokenizer.json with --tokenizer"
        )
    print(f"warning: opening the pickle {path}; unpickling can run code, do so only if you trust it", file=sys.stderr)
    return load_pickled_tokenizer(path, model_max_length)


def pick_dtype(name: str, state_dict: dict[str, torch.Tensor]) -> torch.dtype:
    """float32 by default, which represents the original's float32 matrices and bfloat16 embeddings exactly."""
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


def model_card(args: ConvertArguments, model: PreTrainedModel, architecture: Architecture, step: int) -> str:
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["nanochat"])
    is_path = Path(args.input).expanduser().exists()
    card = CARD.format(
        metadata=f"---\n{data.to_yaml()}\n---",
        name=Path(args.output_dir).name,
        parameters=model.num_parameters(),
        architecture=architecture,
        dtype=dtype_name(model.dtype),
        step=step,
        source=Path(args.input).name if is_path else args.input,
    )
    return card + "\n"


def start(arguments: Sequence[str] | None = None) -> None:
    try:
        (args,) = parse(ConvertArguments, args=arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'modeling-nanochat[train]'") from error
    logging.disable_progress_bar()
    convert(args)


def main(arguments: Sequence[str] | None = None) -> None:
    exit_on_user_error(lambda: start(arguments))


if __name__ == "__main__":
    main()
