"""Measure the speed of tokenizer training and of encoding in every way, and compare the ids.

python tokenizer_train/speed.py --train_files 'text/*.parquet' --vocab_size 32768
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.cli import parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.text.bulk_encoding import BulkEncoder, available_threads
from modeling_nanochat.text.texts import text_dataset
from modeling_nanochat.tokenization_nanochat import disable_special_tokens, escaped, whole_characters
from tokenizer_train.bpe import SplitPattern, train_tokenizer


@dataclass
class SpeedArguments:
    """The text to measure on, and the number of repetitions."""

    train_files: list[str] = field(metadata={"help": "Text: parquet, JSON(L), .txt, globs, folders, Hub ids."})
    vocab_size: int = field(default=32768, metadata={"help": "Entries of the trained tokenizer."})
    split_pattern: SplitPattern = field(default="nanochat", metadata={"help": "How text is split before merging."})
    train_megabytes: float = field(default=75, metadata={"help": "Megabytes of text to train on."})
    encode_megabytes: float = field(default=20, metadata={"help": "Megabytes of text to encode."})
    train_rounds: int = field(default=1, metadata={"help": "Training runs; the median counts."})
    rounds: int = field(default=3, metadata={"help": "Encoding runs in each way; the median counts."})


@dataclass
class Way:
    """One way to train or encode, and the seconds of each run."""

    name: str
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    (args,) = parse(SpeedArguments)
    texts = [text for text in text_dataset(args.train_files, what="train_files")["text"] if text]
    print(f"{platform.machine()}, {available_threads()} threads, {args.split_pattern}, {args.vocab_size} entries")
    documents, size = beginning(texts, args.train_megabytes)
    ways = [Way("tokenizers", partial(train_tokenizer, documents, args.vocab_size, split_pattern=args.split_pattern))]
    tokenizer = alternate(ways, args.train_rounds, lambda tokenizer: tokenizer.backend_tokenizer.to_str())
    print(table(f"training on {len(documents)} documents, {size:.1f} MB", ways, size))
    documents, size = beginning(texts, args.encode_megabytes)
    ways = encoding_ways(tokenizer, documents)
    alternate(ways, args.rounds, lambda encoded: [list(ids) for ids in encoded])
    print(table(f"encoding {len(documents)} documents, {size:.1f} MB", ways, size))


def beginning(texts: Sequence[str], megabytes: float) -> tuple[list[str], float]:
    """Return the first documents with at least `megabytes` in total, and their size in megabytes."""
    documents, size = [], 0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        documents.append(whole_characters(text))
        size += len(documents[-1].encode())
    return documents, size / 1e6


def encoding_ways(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Way]:
    fast = disable_special_tokens(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    inputs, bare = [escaped(text, fast) for text in texts], {"add_special_tokens": False}
    ways = [
        Way("fast tokenizer, one by one", lambda: [fast.encode(text, **bare).ids for text in inputs]),
        Way("fast tokenizer, as a batch", lambda: [row.ids for row in fast.encode_batch(inputs, **bare)]),
    ]
    for threads in (1, available_threads()):
        encoder = BulkEncoder(tokenizer, threads)
        library = "tiktoken" if encoder.tiktoken else "fast tokenizer"
        ways.append(Way(f"BulkEncoder ({library}), {threads} thread(s)", bulk(encoder, texts)))
    return ways


def bulk(encoder: BulkEncoder, texts: list[str]) -> Callable[[], list[Any]]:
    return lambda: [ids[1:] for ids in encoder.encode(texts)]


def alternate(ways: list[Way], rounds: int, comparable: Callable[[Any], Any]) -> Any:
    """Run all ways in turn, `rounds` times, and return the result.

    Raises:
        UserError: The results differ.
    """
    expected = None
    for _ in range(rounds):
        for way in ways:
            with timed(way.seconds):
                result = way.run()
            if expected is None:
                expected = comparable(result)
            elif comparable(result) != expected:
                raise UserError(f"{way.name}: not the same result as {ways[0].name}; report it with library versions")
    return result


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def table(title: str, ways: list[Way], megabytes: float) -> str:
    rows = [[title, "MB/s", "seconds", "(all)"]]
    for way in ways:
        taken, every = median(way.seconds), " ".join(f"{seconds:.2f}" for seconds in way.seconds)
        rows.append([way.name, f"{megabytes / taken:.1f}", f"{taken:.2f}", every])
    return "\n" + text_table(rows)


if __name__ == "__main__":
    exit_on_user_error(main)
