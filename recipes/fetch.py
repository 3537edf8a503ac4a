"""Fetches the data of a recipe: text as parquet shards, conversations, questions, word lists; writes who the model is.

    python recipes/fetch.py --config recipes/speedrun/data.yaml

    python recipes/fetch.py --output_dir runs/mine/data --text karpathy/fineweb-edu-100b-shuffle --train_shards 8

Nothing is downloaded twice: everything is in the Hugging Face cache (HF_HOME), and an interrupted command goes on.
Files in the output folder:

    pretrain/train/*.parquet    links to the first shards of the text
    pretrain/val/*.parquet      links to the last ones
    identity.jsonl              conversations of the persona, for midtraining and SFT
    words.txt, core             links to the published list of words and to CORE's tasks, if a YAML names such a file
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from dataclasses import dataclass, field
from pathlib import Path

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import write_jsonl
from recipes.fetching.named import cache, read_named
from recipes.fetching.shards import Shard, choose, download, link, list_shards
from recipes.identities.dialogues import write_dialogues
from recipes.identities.persona import read_persona
from recipes.identity import IdentityArguments


@dataclass
class FetchArguments:
    """Which data."""

    output_dir: str = field(metadata={"help": "Folder for the data, such as runs/speedrun/data."})
    text: str | None = field(default=None, metadata={"help": "Data set on the Hub whose parquet files are the text."})
    train_shards: int | None = field(
        default=None, metadata={"help": "Parquet files to train on, the first by name; default: all but val_shards."}
    )
    val_shards: int = field(default=1, metadata={"help": "Parquet files to validate on, the last by name."})
    persona: str | None = field(
        default=None, metadata={"help": "YAML file that says who the model is, see recipes/identity.yaml."}
    )
    configs: list[str] = field(
        default_factory=list, metadata={"help": "YAMLs whose data sets, word lists and tasks are put into the cache."}
    )
    workers: int = field(default=8, metadata={"help": "Parquet files to download at the same time."})

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A number is out of range.
        """
        for name, least in (("train_shards", 0), ("val_shards", 0), ("workers", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name}: is {value}, must be at least {least}; correct the setting")


def main() -> None:
    (args,) = parse(FetchArguments)
    folder, named = Path(args.output_dir), read_named(args.configs)
    persona = read_persona(args.persona) if args.persona else None
    train, val = wanted_shards(args)
    try:
        if persona:
            identity = IdentityArguments(output_file=str(folder / "identity.jsonl"))
            dialogues = write_dialogues(persona, identity.conversations, identity.seed)
            write_jsonl(identity.output_file, ({"messages": messages} for messages in dialogues))
        cache(named, folder)
        download([*train, *val], args.workers)
        for name, shards in (("train", train), ("val", val)) if args.text else ():
            link(shards, folder / "pretrain" / name)
    except OSError as error:
        raise UserError(f"output_dir {folder}: cannot be written ({error.strerror or error}); give another") from error
    size = sum(shard.size for shard in (*train, *val)) / 1e9
    text = f": text in {len(train):,} + {len(val):,} files of {size:.1f} GB" if size else ""
    print(f"everything is in {folder} and in the cache{text}")


def wanted_shards(args: FetchArguments) -> tuple[list[Shard], list[Shard]]:
    """The shards to train and to validate on; none without `text`, or if both numbers are 0."""
    if args.text is None or (args.train_shards == 0 and args.val_shards == 0):
        return [], []
    return choose(list_shards(args.text), args.train_shards, args.val_shards)


if __name__ == "__main__":
    exit_on_user_error(main)
