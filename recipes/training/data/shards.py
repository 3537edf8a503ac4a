"""Reading of a streamed data set: shard by shard in blocks, ahead of their use, again if the Hub fails.

A stream of 8 processes on H100s uses a block of 1024 web documents in about 16 seconds. Reading ahead hides an answer
that takes longer, and retries that take up to half a minute.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from queue import SimpleQueue
from time import sleep
from typing import Generic, Protocol, TypeGuard, TypeVar

from datasets import IterableDataset

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line, limit_waiting, may_recover

BLOCK = 1024  # rows of a streamed dataset that are read, and shuffled, together
BYTES_AHEAD = 2**24  # of text that a stream reads ahead, in addition to one block
RETRIES = 10  # of one block: for 10 to 20 minutes, with the retries of huggingface_hub before each
LONGEST_PAUSE = 60.0  # seconds before a retry
Item = TypeVar("Item")


class Shards(Protocol):
    """The shards of a data set."""

    count: int

    def read(self, shard: int, first: int = 0) -> Iterator[list]:
        """Yield the blocks of `shard` from number `first` on; what a blank document became is None."""


class TextShards:
    """The texts of a `datasets.IterableDataset` with a column `text`. A shard is a file or a row group.

    Raises:
        UserError: Reading fails, and would fail again; or the Hub has failed for minutes.
    """

    def __init__(self, dataset: IterableDataset):
        limit_waiting()  # once more: a process that was spawned, not forked, has not done it
        self.dataset, self.count = dataset, dataset.num_shards

    def read(self, shard: int, first: int = 0) -> Iterator[list[str | None]]:
        failures = 0
        while True:
            try:
                rows = self.dataset.shard(num_shards=self.count, index=shard).iter(BLOCK)
                for batch in islice(rows, first, None):
                    yield [text if is_text(text) else None for text in batch["text"]]
                    first, failures = first + 1, 0
                return
            except Exception as error:  # no network, a broken file: the libraries raise many types
                failures += 1
                pause_before_retry(error, failures)


def is_text(text: str | None) -> TypeGuard[str]:
    return bool(text and not text.isspace())


def pause_before_retry(error: Exception, failures: int) -> None:
    """Wait twice as long as after the failure before.

    Raises:
        UserError: A retry would not help, or has not often enough.
    """
    why = first_line(error)
    if failures > RETRIES or not may_recover(error):
        raise UserError(f"streaming the text failed ({why}); resume when it can be read") from error
    pause = min(2.0 ** (failures - 1), LONGEST_PAUSE)
    print(f"warning: streaming the text failed ({why}); retry {failures} of {RETRIES} in {pause:.0f} s", flush=True)
    sleep(pause)


class ReadAhead(Generic[Item]):
    """Iterator over `items`, which a thread takes from them in advance until `close`.

    Args:
        size: Bytes of an item. The thread pauses while those not yet used have `most` or more.
    """

    def __init__(self, items: Iterable[Item], size: Callable[[Item], int], most: int = BYTES_AHEAD):
        self.size, self.most = size, most
        self.ready: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self.bytes, self.closed, self.changed = 0, False, threading.Condition()
        threading.Thread(target=self.read, args=(items,), name="read ahead", daemon=True).start()

    def read(self, items: Iterable[Item]) -> None:
        error: BaseException = StopIteration()
        try:
            for item in items:
                self.ready.put((item, None))
                with self.changed:
                    self.bytes += self.size(item)
                    self.changed.wait_for(lambda: self.closed or self.bytes < self.most)
                if self.closed:
                    return
        except BaseException as raised:  # raised where the item would be used
            error = raised
        self.ready.put((None, error))

    def __iter__(self) -> "ReadAhead[Item]":
        return self

    def __next__(self) -> Item:
        item, error = self.ready.get()
        if error is not None:
            raise error
        assert item is not None
        with self.changed:
            self.bytes -= self.size(item)
            self.changed.notify()
        return item

    def close(self) -> None:
        """Let the thread end after the item that it is reading."""
        with self.changed:
            self.closed = True
            self.changed.notify()
