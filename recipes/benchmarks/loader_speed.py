"""Measures the data loader alone: tokens/s and MB/s of text, without a model.

python recipes/benchmarks/loader_speed.py --tokenizer runs/tokenizer --train_files 'text/*.parquet'
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import time
from dataclasses import dataclass, field

from transformers import AutoTokenizer

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import exit_on_user_error
from modeling_nanochat.text.texts import text_source
from recipes.training.data.loader import Loader
from recipes.training.data.streams import TextStreams


@dataclass
class LoaderSpeedArguments:
    """Data arguments of pretraining, and the duration."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Parquet, JSONL or text files or globs, or one Hub dataset."})
    max_length: int = field(default=2048, metadata={"help": "Tokens per row."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per batch."})
    seconds: float = field(default=10, metadata={"help": "Duration of the measurement, after the first batch."})


def main() -> None:
    (args,) = parse(LoaderSpeedArguments)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    texts = text_source(args.train_files, what="train_files")
    started = time.perf_counter()
    loader = Loader(TextStreams(texts, tokenizer, args.max_length), batch_size=args.per_device_train_batch_size)
    first = next(loader)["input_ids"]
    waited = time.perf_counter() - started
    tokens, seconds = measure(loader, args.seconds)
    loader.close()
    size = len(tokenizer.decode(first.flatten().tolist()).encode()) / first.numel()
    print(
        f"first batch after {waited:.1f} s, then {tokens / seconds:,.0f} tokens/s = "
        f"{tokens * size / seconds / 1e6:.1f} MB/s of packed text ({size:.2f} bytes per token)"
    )


def measure(loader: Loader, seconds: float) -> tuple[int, float]:
    tokens, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        tokens += next(loader)["input_ids"].numel()
    return tokens, passed


if __name__ == "__main__":
    exit_on_user_error(main)
