"""Train the tokenizer: byte-level BPE on the pretraining text, saved as an ordinary fast tokenizer with chat template.

    python tokenizer_train/train.py --config recipes/pocket/tokenizer.yaml

    python tokenizer_train/train.py --train_files 'text/*.parquet' --vocab_size 32768 --output_dir runs/mine/tokenizer
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import whole_folder
from modeling_nanochat.sources import text_dataset
from modeling_nanochat.tokenization_nanochat import encode_documents
from tokenizer_train.bpe import train_tokenizer


@dataclass
class TokenizerArguments:
    """What the tokenizer is trained on, and how large it gets."""

    train_files: list[str] = field(metadata={"help": "Parquet, JSONL or text files or patterns, or one Hub dataset."})
    output_dir: str = field(metadata={"help": "Tokenizer folder to write."})
    vocab_size: int = field(default=65536, metadata={"help": "Entries, the 256 bytes and 9 special tokens included."})
    max_chars: int = field(default=2_000_000_000, metadata={"help": "Characters to read in all."})
    doc_cap: int = field(default=10_000, metadata={"help": "Characters to read of one document."})
    model_max_length: int = field(default=2048, metadata={"help": "Context length written into the tokenizer."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished tokenizer there."})


def main() -> None:
    (args,) = parse(TokenizerArguments)
    target = Path(args.output_dir)
    if target.exists() and not args.overwrite_output_dir:
        raise UserError(f"{target} already exists; pass --overwrite_output_dir true or another --output_dir")
    texts = text_dataset(args.train_files, what="train_files")["text"]
    started = time.perf_counter()
    tokenizer = train_tokenizer(
        capped(texts, args.max_chars, args.doc_cap),
        args.vocab_size,
        model_max_length=args.model_max_length,
        length=len(texts),
    )
    if len(tokenizer) < args.vocab_size:
        raise UserError(
            f"the text has merges for only {len(tokenizer)} of {args.vocab_size} entries; lower --vocab_size or add text"
        )
    with whole_folder(target) as folder:
        tokenizer.save_pretrained(folder)
    record = {
        "stage": "tokenizer",
        "settings": asdict(args),
        "seconds": round(time.perf_counter() - started, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes_per_token": round(bytes_per_token(tokenizer, texts[:200]), 3),
    }
    write_record(record, target)
    print(f"{target}: {len(tokenizer)} entries, {record['bytes_per_token']} bytes per token, {record['seconds']} s")


def capped(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """The beginning of each document, until `max_chars` characters were given out."""
    characters = 0
    for text in texts:
        if characters > max_chars:
            return
        characters += len(text[:doc_cap])
        yield text[:doc_cap]


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    tokens = sum(len(ids) - 1 for ids in encode_documents(tokenizer, texts))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def write_record(record: dict, target: Path) -> None:
    """Beside the folder, as every stage does: `<run>/stages/tokenizer.json`."""
    path = target.parent / "stages" / f"{target.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_on_user_error(main)
