"""Measures the data loader alone, without a model: tokens/s at most, and the share of time waited at a given pace.

python recipes/benchmarks/loader_speed.py --tokenizer runs/tokenizer --train_files 'text/*.parquet'
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import AutoTokenizer

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import exit_on_user_error
from modeling_nanochat.text.texts import text_source
from recipes.training.data.loader import Loader
from recipes.training.data.streams import TextStreams
from recipes.training.data.tokenized import token_cache

NEEDED = 1_100_000  # tokens/s of d20 on 8 H100s, by the original's 3 hours for 11.2 billion tokens
WARM_UP = 10.0  # seconds in which training compiles its first step, and the buffers fill


@dataclass
class LoaderSpeedArguments:
    """Data arguments of pretraining, which process is measured, and for how long."""

    tokenizer: str = field(metadata={"help": "Tokenizer folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Parquet, JSONL or text files or globs, or one Hub dataset."})
    tokenized_cache: str | None = field(default=None, metadata={"help": "As in pretraining."})
    max_length: int = field(default=2048, metadata={"help": "Tokens per row."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per batch."})
    processes: int = field(default=1, metadata={"help": "Measure the first of so many processes."})
    needed: int = field(default=NEEDED, metadata={"help": "Tokens/s that training uses, all processes together."})
    seconds: float = field(default=10, metadata={"help": "Duration of each measurement, after the first batch."})


class Measurement(NamedTuple):
    """Of one process. `first`: seconds until the first batch; `waited`: share of the time at the needed pace."""

    first: float
    tokens_per_second: float
    waited: float
    bytes_per_token: float


def main() -> None:
    (args,) = parse(LoaderSpeedArguments)
    result, needed = measure(args), args.needed / args.processes
    size = result.tokens_per_second * result.bytes_per_token / 1e6
    print(
        f"first batch after {result.first:.1f} s, then {result.tokens_per_second:,.0f} tokens/s = {size:.1f} MB/s of "
        f"packed text ({result.bytes_per_token:.2f} bytes per token); one of {args.processes} processes needs "
        f"{needed:,.0f} tokens/s, and waits for {100 * result.waited:.1f} % of the time"
    )


def measure(args: LoaderSpeedArguments) -> Measurement:
    """Read for `seconds` at the pace of training, then as fast as possible, which empties the buffers."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    texts = text_source(args.train_files, what="train_files")
    cache = token_cache(args.tokenized_cache, texts, args.train_files, tokenizer) if args.tokenized_cache else None
    streams = TextStreams(texts, tokenizer, args.max_length, cache=cache)
    streams.fill_cache()
    started = time.perf_counter()
    loader = Loader(streams, batch_size=args.per_device_train_batch_size, world_size=args.processes)
    ids = next(loader)["input_ids"].flatten().tolist()
    first = time.perf_counter() - started
    time.sleep(WARM_UP)
    _, waited = read(loader, args.seconds, args.needed / args.processes)
    speed, _ = read(loader, args.seconds)
    loader.close()
    return Measurement(first, speed, waited, len(tokenizer.decode(ids).encode()) / len(ids))


def read(loader: Loader, seconds: float, pace: float = float("inf")) -> tuple[float, float]:
    """Tokens/s, and the share of the time waited, of a training that uses `pace` tokens/s if it gets them."""
    tokens, waited, started = 0, 0.0, time.perf_counter()
    while (before := time.perf_counter()) < started + seconds:
        count = next(loader)["input_ids"].numel()
        waited += time.perf_counter() - before
        tokens += count
        time.sleep(count / pace)
    passed = before - started
    return tokens / passed, waited / passed


if __name__ == "__main__":
    exit_on_user_error(main)
