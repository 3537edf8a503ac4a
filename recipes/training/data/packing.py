"""Packs documents and conversations into rows of one length; every row begins with `<|bos|>`.

Best fit, as in the original: documents are cropped as little as possible, conversations never.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

IGNORED = -100
Ids = Sequence[int] | np.ndarray
Conversation = tuple[Ids, Ids]  # token ids, and 1 for tokens to train on
Item = TypeVar("Item")


class Buffer(Generic[Item]):
    """Items waiting for a row, refilled from batches to at least `size` items as long as there are any.

    Batches are of pairs (length in tokens, item).
    """

    def __init__(self, batches: Iterable[Iterable[tuple[int, Item]]], size: int):
        self.batches, self.size = iter(batches), size
        self.waiting: list[tuple[int, int, Item]] = []  # sorted: length, order of arrival, item
        self.arrived = 0

    def refill(self) -> bool:
        """Refill from the batches; False if nothing is left."""
        while len(self.waiting) < self.size:
            batch = next(self.batches, None)
            if batch is None:
                break
            for length, item in batch:
                self.add(length, item)
        return bool(self.waiting)

    def add(self, length: int, item: Item) -> None:
        insort(self.waiting, (length, self.arrived, item))
        self.arrived += 1

    def pop_longest_fitting(self, space: int) -> Item | None:
        """Remove and return the longest item of at most `space` tokens, earliest first; None if there is none."""
        end = bisect_left(self.waiting, (space + 1,))
        if end == 0:
            return None
        longest = self.waiting[end - 1][0]
        return self.waiting.pop(bisect_left(self.waiting, (longest,)))[2]

    def pop_shortest(self) -> Item:
        return self.waiting.pop(0)[2]


def fill_with_documents(buffer: Buffer[np.ndarray], row: np.ndarray) -> bool:
    """Write a row (capacity,) of documents, ids that begin with `<|bos|>`; False if there are too few to fill it.

    Takes the longest waiting document that still fits; if none does, crops the shortest to fill the rest.
    """
    end = 0
    while end < len(row) and buffer.refill():
        document = buffer.pop_longest_fitting(len(row) - end)
        if document is None:
            document = buffer.pop_shortest()
        document = document[: len(row) - end]
        row[end : end + len(document)] = document
        end += len(document)
    return end == len(row)


def fill_with_conversations(
    buffer: Buffer[Conversation], ids: np.ndarray, labels: np.ndarray, pad_token_id: int
) -> bool:
    """Write a row of uncropped conversations into `ids` and `labels` (capacity,); False if none was left.

    Labels are the ids where the mask is 1 and -100 elsewhere, unshifted. Space that no conversation fits is padded.

    Raises:
        ValueError: A conversation is longer than a row.
    """
    end = 0
    while buffer.refill():
        conversation = buffer.pop_longest_fitting(len(ids) - end)
        if conversation is None:
            if end == 0:
                raise ValueError(f"a conversation is longer than a row of {len(ids)} tokens")
            break
        tokens, mask = (np.asarray(part) for part in conversation[:2])
        start, end = end, end + len(tokens)
        ids[start:end] = tokens
        labels[start:end] = np.where(mask, ids[start:end], IGNORED)
    ids[end:], labels[end:] = pad_token_id, IGNORED
    return end > 0


def pack_documents(batches: Iterable[Sequence[Ids]], capacity: int, buffer_size: int = 1000) -> Iterator[np.ndarray]:
    """Yield rows (capacity,) int64 from batches of documents until they end; drops a last, partial row."""
    sized = ([(len(document), np.asarray(document)) for document in batch] for batch in batches)
    buffer: Buffer[np.ndarray] = Buffer(sized, buffer_size)
    while fill_with_documents(buffer, row := np.empty(capacity, dtype=np.int64)):
        yield row


def pack_conversations(
    batches: Iterable[Sequence[Conversation]], capacity: int, pad_token_id: int, buffer_size: int = 100
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows of ids and labels (capacity,) int64 from batches of conversations until they end.

    Conversations are not cropped: remove those longer than a row, or without a token to train on, before.
    """
    sized = ([(len(conversation[0]), conversation) for conversation in batch] for batch in batches)
    buffer: Buffer[Conversation] = Buffer(sized, buffer_size)
    while True:
        ids, labels = np.empty(capacity, dtype=np.int64), np.empty(capacity, dtype=np.int64)
        if not fill_with_conversations(buffer, ids, labels, pad_token_id):
            return
        yield ids, labels
