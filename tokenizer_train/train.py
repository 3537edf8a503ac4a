"""Train the tokenizer: byte-level BPE on the pretraining text, saved as a standard fast tokenizer with chat template.

    python tokenizer_train/train.py --config recipes/pocket/tokenizer.yaml

    python tokenizer_train/train.py --train_files 'text/*.parquet' --output_dir runs/mine/tokenizer

    python tokenizer_train/train.py --train_files HuggingFaceFW/fineweb-edu:sample-10BT:train 'code/*.jsonl' \\
        --train_weights 0.8 0.2 --training_recipe classic --output_dir runs/mine/tokenizer

Notable features:
- streams any dataset, or several by weight: memory holds only the counts
- the same merges as the original's trainer, and the same files on every run
- no custom code in the folder: `AutoTokenizer.from_pretrained` loads it anywhere, ready for chats and generation
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import atomic_directory, write_json
from modeling_nanochat.text.token_bytes import token_bytes
from modeling_nanochat.tokenization_nanochat import encode_documents, save_tokenizer
from tokenizer_train.bpe import SplitPattern, check_request, train_tokenizer
from tokenizer_train.mixture import (
    Source,
    by_weight,
    characters_read,
    expected_characters,
    one_after_the_other,
    open_sources,
)

VOCABULARY_SIZES = {"classic": 65536, "current": 32768}  # the original's at launch, and today's
COUNTS = ("characters", "documents", "documents_cut", "characters_left_out")  # recorded for each source
SAMPLE = 200  # documents for the reported bytes per token


@dataclass
class TokenizerArguments:
    """The training text, the size of the vocabulary, and the output folder."""

    train_files: list[str] = field(
        metadata={
            "help": "Parquet, JSON(L), .txt, patterns, folders, or Hub datasets owner/name, owner/name:split or "
            "owner/name:configuration:split."
        }
    )
    output_dir: str = field(metadata={"help": "Tokenizer folder to write."})
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Share of the characters for each entry of train_files; if unset, all of each in order."},
    )
    training_recipe: Literal["current", "classic"] = field(
        default="current", metadata={"help": "Sets the default vocab_size; classic is nanochat's launch."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Entries, with the 256 bytes and 9 special tokens; current: 32768, classic: 65536."},
    )
    split_pattern: SplitPattern = field(default="nanochat", metadata={"help": "How text is split before merging."})
    max_chars: int = field(default=2_000_000_000, metadata={"help": "Maximum characters to read in total."})
    doc_cap: int = field(default=10_000, metadata={"help": "Maximum characters to read per document."})
    model_max_length: int = field(default=2048, metadata={"help": "Context length written into the tokenizer."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an existing tokenizer."})


def main() -> None:
    (args,) = parse(TokenizerArguments)
    check(args)
    started, target = time.perf_counter(), Path(args.output_dir)
    sources = open_sources(args.train_files, args.train_weights, args.doc_cap)
    reading = Reading(args, sources)
    tokenizer = train_tokenizer(
        reading, args.vocab_size, split_pattern=args.split_pattern, model_max_length=args.model_max_length
    )
    check_size(tokenizer, args, reading)
    save(tokenizer, target)
    record = {
        "stage": "tokenizer",
        "settings": asdict(args),
        "sources": [{"name": source.name} | {key: getattr(source, key) for key in COUNTS} for source in sources],
        **{key: sum(getattr(source, key) for source in sources) for key in COUNTS},
        "seconds": round(time.perf_counter() - started, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes_per_token": round(bytes_per_token(tokenizer, reading.sample), 3),
    }
    write_record(record, target)
    print(f"{target}: {len(tokenizer)} entries, {record['bytes_per_token']} bytes per token, {record['seconds']} s")


def check(args: TokenizerArguments) -> None:
    """Resolve unset settings; raise [`UserError`] for invalid ones, before anything is read."""
    if args.vocab_size is None:
        args.vocab_size = VOCABULARY_SIZES[args.training_recipe]
    for name in ("max_chars", "doc_cap", "model_max_length"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; give a positive number")
    check_request(args.vocab_size, args.split_pattern)
    check_target(Path(args.output_dir), args.overwrite_output_dir)


def check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists; pass --overwrite_output_dir true or another --output_dir")
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"{target} cannot be written: {existing} is not a writable folder; pass another --output_dir")


def check_size(tokenizer: PreTrainedTokenizerFast, args: TokenizerArguments, reading: "Reading") -> None:
    if len(tokenizer) == args.vocab_size:
        return
    if not any(text.strip() for text in reading.sample):
        raise UserError(f"train_files: no text in {', '.join(args.train_files[:3])}; every document is empty")
    raise UserError(
        f"the text has merges for only {len(tokenizer)} of {args.vocab_size} entries; lower --vocab_size or add text"
    )


class Reading:
    """Iterates over the training texts with a progress bar over characters; keeps the first few."""

    def __init__(self, args: TokenizerArguments, sources: list[Source]):
        self.args, self.sources = args, sources
        mix = by_weight if args.train_weights else one_after_the_other
        self.texts = mix(sources, args.doc_cap, args.max_chars)
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        expected = expected_characters(self.sources, self.args.max_chars, bool(self.args.train_weights))
        with tqdm(total=expected, desc="reading", unit="char", unit_scale=True, disable=None, leave=False) as bar:
            for text in self.texts:
                bar.update(len(text))
                if len(self.sample) < SAMPLE:
                    self.sample.append(text[:10_000])
                yield text
        documents = sum(source.documents for source in self.sources)
        read = f"read {characters_read(self.sources):,} characters in {documents:,} documents"
        print(f"{read}, {time.perf_counter() - started:.1f} s; merging", flush=True)
        if any(source.documents_cut for source in self.sources):
            print(cut_line(self.sources, self.args.doc_cap), flush=True)


def cut_line(sources: list[Source], doc_cap: int) -> str:
    cut, left_out = (
        sum(getattr(source, key) for source in sources) for key in ("documents_cut", "characters_left_out")
    )
    return (
        f"{cut:,} of them longer than {doc_cap:,} characters: {left_out:,} characters were skipped; raise --doc_cap "
        "to read more of each, or separate the documents within, in a .txt file by blank lines"
    )


def save(tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write the folder atomically, with the bytes of each token (V,) int32 for bits per byte."""
    try:
        with atomic_directory(target) as folder:
            save_tokenizer(tokenizer, folder)
            save_file({"token_bytes": token_bytes(tokenizer)}, folder / "token_bytes.safetensors")
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); pass another --output_dir"
        ) from error


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    tokens = sum(len(ids) - 1 for ids in encode_documents(tokenizer, texts))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def write_record(record: dict, target: Path) -> None:
    """Write `<run>/stages/tokenizer.json` beside the folder, as every stage does."""
    write_json(target.parent / "stages" / f"{target.name}.json", record)


if __name__ == "__main__":
    exit_on_user_error(main)
