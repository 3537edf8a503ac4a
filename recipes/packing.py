"""Packing: documents and conversations into rows of one length, every row beginning with `<|bos|>`.

Best fit, as in the original: cut rows from long texts with few losses (documents) or not at all (conversations).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

IGNORED = -100
Conversation = tuple[list[int], list[int]]  # token ids, and 1 where the token is to be learnt
Item = TypeVar("Item")


class Buffer(Generic[Item]):
    """Items waiting for a row, refilled from batches so that at least `size` are on hand while there are any."""

    def __init__(self, batches: Iterable[list[Item]], size: int, length: Callable[[Item], int]):
        self.batches, self.size, self.length = iter(batches), size, length
        self.items: list[Item] = []

    def refill(self) -> bool:
        """True while there is something to take."""
        while len(self.items) < self.size:
            batch = next(self.batches, None)
            if batch is None:
                break
            self.items += batch
        return bool(self.items)

    def pop_longest_fitting(self, space: int) -> Item | None:
        """The longest item of at most `space` tokens, the earliest of equals; None if there is none."""
        lengths = [(self.length(item), -i) for i, item in enumerate(self.items) if self.length(item) <= space]
        return self.items.pop(-max(lengths)[1]) if lengths else None

    def pop_shortest(self) -> Item:
        return self.items.pop(min(range(len(self.items)), key=lambda i: self.length(self.items[i])))


def pack_documents(batches: Iterable[list[list[int]]], capacity: int, buffer_size: int = 1000) -> Iterator[list[int]]:
    """Rows of exactly `capacity` ids from batches of documents (ids that begin with `<|bos|>`).

    Into a row goes the longest waiting document that still fits; when none does, the shortest is cut to fill the rest.
    Only a last, unfilled row is dropped.
    """
    buffer = Buffer(batches, buffer_size, len)
    row: list[int] = []
    while buffer.refill():
        document = buffer.pop_longest_fitting(capacity - len(row))
        row += document if document is not None else buffer.pop_shortest()[: capacity - len(row)]
        if len(row) == capacity:
            yield row
            row = []


def pack_conversations(
    batches: Iterable[list[Conversation]], capacity: int, pad_token_id: int, buffer_size: int = 100
) -> Iterator[Conversation]:
    """Rows (ids, labels) of exactly `capacity` from whole conversations; what is left of a row is padding.

    Labels are the ids where the mask is 1 and -100 elsewhere, unshifted. No conversation is cut: one that is longer
    than `capacity` or has nothing to learn must be left out before (see `recipes.data`).

    Raises:
        ValueError: A conversation is longer than a row.
    """
    buffer = Buffer(batches, buffer_size, lambda conversation: len(conversation[0]))
    ids: list[int] = []
    labels: list[int] = []
    while buffer.refill():
        conversation = buffer.pop_longest_fitting(capacity - len(ids))
        if conversation is not None:
            ids += conversation[0]
            labels += [token if learn else IGNORED for token, learn in zip(*conversation, strict=True)]
        elif not ids:
            raise ValueError(f"a conversation is longer than a row of {capacity} tokens")
        else:
            yield pad(ids, labels, capacity, pad_token_id)
            ids, labels = [], []
    if ids:
        yield pad(ids, labels, capacity, pad_token_id)


def pad(ids: list[int], labels: list[int], capacity: int, pad_token_id: int) -> Conversation:
    missing = capacity - len(ids)
    return ids + [pad_token_id] * missing, labels + [IGNORED] * missing
