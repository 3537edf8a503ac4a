"""Convert checkpoints of the original nanochat to model folders, and back.

    nanochat-convert --input ~/.cache/nanochat/chatsft_checkpoints/d20 --output_dir d20

    nanochat-convert --input karpathy/nanochat-d32 --output_dir d32

    nanochat-convert --input runs/d20/sft --to original --output_dir back/d20

The layout of a checkpoint, launch or current, is detected from its tensors: launch becomes plain, current turbo.
Logits stay the same; models that neither architecture can compute, and conversions that lose a tensor, are refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers.utils import logging

from ..checks.configuration import check_config
from ..checks.files import check_files
from ..cli import parse
from ..errors import UserError, exit_on_user_error
from ..folders import atomic_directory
from ..hub import find_folder
from .checkpoint import refuse_loss, state_dict_to_original, turbo_places
from .config import config_to_original
from .files import read_config, read_safetensors, steps
from .model_folder import SMALL_FILES, write_model_folder


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
        metadata={
            "help": "Tokenizer folder or Hub id; default: the input, a folder `tokenizer` in it or, as the original "
            "keeps it, next to its parent."
        },
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
    """Original checkpoint -> model folder."""
    folder = find_folder(args.input, *SMALL_FILES)
    if not steps(folder) and (folder / "config.json").is_file():
        refuse_model_folder(args, folder)
    written = write_model_folder(
        args.input,
        args.output_dir,
        step=args.step,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        allow_turbo=args.to == "hub",
    )
    print(f"{args.output_dir}: {written}")


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
