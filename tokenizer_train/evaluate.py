"""Compare a tokenizer's compression with GPT-2's and GPT-4's on several kinds of text; describe its vocabulary.

    python tokenizer_train/evaluate.py --config recipes/pocket/tokenizer_eval.yaml

    python tokenizer_train/evaluate.py --tokenizer runs/mine/tokenizer --train_files 'text/*.parquet' \
        --val_files val.parquet --baselines Qwen/Qwen3-0.6B --output_file runs/mine/results/tokenizer.json

Notable features:
- checks that decoding restores every text
- GPT-2's and GPT-4's vocabulary: from tiktoken's cache (TIKTOKEN_CACHE_DIR), or downloaded by tiktoken
- unavailable vocabularies are reported, and their columns omitted
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_nanochat.cli import parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import write_json
from modeling_nanochat.text.bulk_encoding import BulkEncoder
from modeling_nanochat.text.sources import first_line
from modeling_nanochat.text.token_bytes import token_spellings
from modeling_nanochat.tokenization_nanochat import special_token_ids
from tokenizer_train.texts import Text, corpus_text, given_text, sample_texts
from tokenizer_train.vocabularies import Vocabulary, load_baselines, parse_baselines
from tokenizer_train.vocabulary_statistics import vocabulary_statistics

OURS = "ours"


@dataclass
class TokenizerEvaluateArguments:
    """The tokenizer, the texts, and the tokenizers to compare with."""

    tokenizer: str = field(metadata={"help": "Tokenizer or model folder, or Hub id."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the record, for the report card."})
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "Its training text: parquet, JSON(L) or .txt, folders, Hub ids."}
    )
    val_files: list[str] = field(default_factory=list, metadata={"help": "Held-out text of the same kind."})
    texts: list[str] = field(default_factory=list, metadata={"help": "Additional texts, each as name=file.txt."})
    max_bytes: int = field(default=5_000_000, metadata={"help": "Bytes to read from train_files and from val_files."})
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Other tokenizers to compare with: folder, Hub id or name=folder."}
    )

    def check(self) -> None:
        """Raise `UserError` on an invalid setting."""
        if self.max_bytes < 1:
            raise UserError(f"max_bytes is {self.max_bytes}; it must be at least 1")


def main() -> None:
    (args,) = parse(TokenizerEvaluateArguments)
    record = evaluate_tokenizer(args)
    if args.output_file:
        write_json(args.output_file, record)
    print(f"{args.tokenizer}, {record['seconds']} s" + (f", record in {args.output_file}" if args.output_file else ""))
    print(text_table(record["table"]))
    print("\n".join([*missing_lines(record), *statistics_lines(record["statistics"])]))


def evaluate_tokenizer(args: TokenizerEvaluateArguments) -> dict[str, Any]:
    """Return the record; `table` has the rows that are printed and shown in the report.

    Its keys: "tokenizer", "settings", "seconds", "vocabularies", "missing", "texts", "table", "statistics".

    Raises:
        UserError: A setting or file is invalid, the tokenizer is not one of ours, or decoding does not restore a text.
    """
    args.check()
    named = parse_baselines(args.baselines)
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.tokenizer)
    texts = load_texts(args)
    baselines, missing = load_baselines(named)
    encoder, spellings = BulkEncoder(tokenizer), token_spellings(tokenizer)
    rows, counts = [], {}
    for text in texts:
        ids = round_trip(text, encoder, spellings)
        rows.append(compare(text, len(ids), baselines))
        counts[text.name] = np.bincount(ids, minlength=len(spellings))
    vocabularies = [{"name": v.name, "entries": v.entries, "source": v.source} for v in baselines]
    vocabularies.append({"name": OURS, "entries": len(tokenizer), "source": args.tokenizer})
    return {
        "tokenizer": args.tokenizer,
        "settings": asdict(args),
        "seconds": round(time.perf_counter() - started, 1),
        "vocabularies": vocabularies,
        "missing": missing,
        "texts": rows,
        "table": table_rows(vocabularies, rows),
        "statistics": vocabulary_statistics(tokenizer, {t: counts[t] for t in counts if t in ("train", "val")}),
    }


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer; raise [`UserError`] unless it is byte-level with nanochat's special tokens."""
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()
    if looks_local and not Path(name, "tokenizer.json").is_file():
        raise UserError(f"{name}: not a tokenizer folder (no tokenizer.json); train one with tokenizer_train/train.py")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many types, for a broken file, an unknown id or no network
        raise UserError(f"{name}: could not be opened as a tokenizer ({first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{name}: a {type(tokenizer).__name__}, not a fast tokenizer; give it as one of --baselines")
    token_spellings(tokenizer)
    special_token_ids(tokenizer)
    return tokenizer


def load_texts(args: TokenizerEvaluateArguments) -> list[Text]:
    texts = sample_texts() + [given_text(argument) for argument in args.texts]
    for name, files in (("train", args.train_files), ("val", args.val_files)):
        texts += [corpus_text(name, files, args.max_bytes)] if files else []
    names = [text.name for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"texts: {twice[0]!r} is the name of two texts; rename yours")
    return texts


def round_trip(text: Text, encoder: BulkEncoder, spellings: Sequence[bytes]) -> np.ndarray:
    """Return the ids (n,) of all documents, without `<|bos|>`.

    Raises:
        UserError: Decoding does not restore a document.
    """
    encoded = [ids[1:] for ids in encoder.encode(text.documents)]
    for number, (document, ids) in enumerate(zip(text.documents, encoded, strict=True), start=1):
        if b"".join(spellings[index] for index in ids) != document.encode():
            raise UserError(
                f"{text.name} ({text.source}): encoding and decoding changes document {number}; "
                "this tokenizer loses text, do not train with it"
            )
    return np.concatenate(encoded)


def compare(text: Text, tokens: int, baselines: Sequence[Vocabulary]) -> dict[str, Any]:
    """Return the text's row: tokens of each vocabulary, and how many percent fewer ours needs."""
    counts = {vocabulary.name: vocabulary.count(text.documents) for vocabulary in baselines} | {OURS: tokens}
    return {
        "name": text.name,
        "source": text.source,
        "documents": len(text.documents),
        "bytes": text.bytes,
        "words": text.words,
        "tokens": counts,
        "bytes_per_token": {name: round(text.bytes / count, 4) for name, count in counts.items()},
        "tokens_per_word": round(tokens / text.words, 4),
        "fewer_percent": {v.name: round(100 * (counts[v.name] - tokens) / counts[v.name], 2) for v in baselines},
    }


def table_rows(vocabularies: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return tokens and bytes per token of each vocabulary, and how ours compares, as in the original's report."""
    names = [vocabulary["name"] for vocabulary in vocabularies]
    heads = [cell for v in vocabularies for cell in (f"{v['name']} ({v['entries']:,})", "ratio")]
    rows = [["text", "bytes", *heads, "per word", *(f"vs {name}" for name in names[:-1])]]
    for text in texts:
        counts = [c for n in names for c in (f"{text['tokens'][n]:,}", f"{text['bytes_per_token'][n]:.2f}")]
        fewer = [f"{text['fewer_percent'][name]:+.1f} %" for name in names[:-1]]
        rows.append([text["name"], f"{text['bytes']:,}", *counts, f"{text['tokens_per_word']:.2f}", *fewer])
    return rows


def missing_lines(record: dict[str, Any]) -> list[str]:
    return [f"left out: {name}, {reason}" for name, reason in record["missing"].items()]


def statistics_lines(statistics: dict[str, Any]) -> list[str]:
    sizes, entries = statistics["token_bytes"], statistics["entries"] - statistics["special_tokens"]
    lines = [
        f"tokens: {statistics['entries']:,}, of these {statistics['special_tokens']} special; bytes of the others: "
        f"min {sizes['min']}, max {sizes['max']}, mean {sizes['mean']:.2f}, std {sizes['std']:.2f}",
        "kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in statistics["kinds"].items()),
        "longest: " + "  ".join(json.dumps(token, ensure_ascii=False) for token in statistics["longest"][:5]),
        f"never produced by encoding their own bytes: {statistics['unreachable']['tokens']}",
    ]
    used = [f"{name} {count:,} ({100 * count / entries:.1f} %)" for name, count in statistics["used"].items()]
    return lines + ([f"used by the text of: {', '.join(used)}"] if used else [])


if __name__ == "__main__":
    exit_on_user_error(main)
