"""The files of a model folder: which must be there, how large they may be, and that none leads out of the folder.

Checked before any library opens them: a pipe would block it, and a file of many gigabytes be read whole.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MERGE = "AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')"
# Every other file that the libraries read, with the most bytes it may have. A vocabulary of 262,144 takes 33 MB.
MAX_BYTES = {
    "config.json": 2**20,
    "generation_config.json": 2**18,
    WEIGHTS_INDEX: 2**25,
    "tokenizer.json": 2**26,
    "tokenizer_config.json": 2**22,
    "special_tokens_map.json": 2**20,
    "added_tokens.json": 2**20,
    "chat_template.jinja": 2**20,
}
MAX_TENSORS = 100_000  # each takes the libraries some 20 microseconds
WITH_TEMPLATES = "additional_chat_templates"  # a folder, which transformers reads too


def check_model_files(folder: Path, name: str) -> None:
    """Raise [`UserError`] for a folder that is incomplete, or whose files are too large, no files, or pickled."""
    if (folder / "adapter_config.json").is_file():  # transformers would open the base model that it names
        raise UserError(
            f"{name}: a PEFT adapter, not a full model; merge it into its base model with peft's "
            f"{MERGE.format(name=name)}, copy the tokenizer's files into `merged` and give that"
        )
    check_files(folder, name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: has no config.json, so it is not a model folder; did the training stage finish?")
    if not (folder / WEIGHTS).is_file():
        check_shards(folder, name)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{name}: has no tokenizer.json; copy the tokenizer folder that the model was trained with into it"
        )


def check_files(folder: Path, name: str) -> None:
    """Raise [`UserError`] for a file that is none, such as a pipe or a device, or too large to be what its name says.

    Links are followed, because the Hub's cache consists of them.
    """
    for file, limit in MAX_BYTES.items():
        path = folder / file
        if not os.path.lexists(path):
            continue
        size = path.stat().st_size if path.is_file() else 0
        if not 0 < size <= limit:
            what = f"has {size:,} bytes, at most {limit:,} are read" if size else "is empty or not a regular file"
            raise UserError(f"{name}: {file} {what}; copy or download it again")
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json", name)
    if (folder / WITH_TEMPLATES).exists():
        raise UserError(f"{name}: {WITH_TEMPLATES} is not read, one chat template is used; remove it")


def weight_files(folder: Path, name: str) -> list[Path]:
    """The folder's safetensors."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / shard for shard in check_shards(folder, name)]


def check_shards(folder: Path, name: str) -> list[str]:
    """The files that the index names; raise [`UserError`] unless all are safetensors that exist in this folder.

    transformers would open any path it names, pickles included. Links are followed: the Hub's cache consists of them.
    """
    if not (folder / WEIGHTS_INDEX).is_file():
        pickled = " (pickled weights are not opened, convert them)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"{name}: has no {WEIGHTS}{pickled}; did the training stage finish, or the download?")
    shards = read_json(folder / WEIGHTS_INDEX, name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{name}: {WEIGHTS_INDEX} has no `weight_map`; save the model again")
    if len(shards) > MAX_TENSORS:
        raise UserError(f"{name}: {WEIGHTS_INDEX} names {len(shards):,} tensors, at most {MAX_TENSORS:,} are opened")
    files = sorted({str(shard) for shard in shards.values()})
    for shard in files:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(f"{name}: {WEIGHTS_INDEX} names {shard!r}; only safetensors inside the folder are opened")
        if not (folder / shard).is_file():
            raise UserError(f"{name}: has no {shard}, which {WEIGHTS_INDEX} names; copy or download the folder again")
    return files


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        UserError: The file is no JSON object, has a key twice, which libraries read differently, or a number like NaN.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates, parse_constant=refuse_constant
        )
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {path.name} cannot be opened: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: {path.name} cannot be opened: not a JSON object")
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return content


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")
