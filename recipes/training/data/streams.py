"""Streams of rows: a fixed order of the rows of a run, for any number of processes.

Row g of a run comes from stream g % STREAMS. A stream is an endless sequence of packed rows, determined by the data,
the tokenizer, the seed and the stream's number. So a run gets the same rows in the same order on one process or
sixty-four, and can resume on another number; a process tokenizes only for the streams it needs.

    1, 2, 4, 8, 16 processes    divide the streams among them
    32, 64, ...                 two, four, ... processes compute the same stream
    3, 5, 7, ...                every process computes all streams, and skips the rows of other processes

Each stream packs from its own buffer of 64 to 191 documents; filling 16 streams from 2,048 documents takes about a
second. Compared with the original's one 1,000-document buffer, 22.7 % of the tokens of children's stories are cropped
instead of 22.4 %; of documents with web-like lengths (lognormal), 24.5 % instead of 18.8 % after 30,000 rows, where
the one buffer was still filling with documents longer than a row (in the long run at least 21.7 % are cropped).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.bulk_encoding import BulkEncoder

from .documents import (
    CHUNK_SIZE,
    CONVERSATIONS,
    Epochs,
    ShuffledDocuments,
    State,
    StreamedDocuments,
    StridedSampler,
    chunk_size,
)
from .packing import Buffer, Conversation, fill_with_conversations, fill_with_documents
from .shards import Shards, TextShards, is_text
from .tokenized import Ids, TokenCache, TokenizedFile, TokenizedShards

STREAMS = 16
FEW = STREAMS * CHUNK_SIZE  # up to this many documents are encoded only once, for all streams and epochs
CHARACTERS_AT_ONCE = 2**22  # of the documents in one call of the encoder
Row = dict[str, np.ndarray]  # name -> int64 (width,), written in place
Document = tuple[int, np.ndarray]  # length in tokens, and the ids (n,) uint32, cropped to a row
Encode = Callable[[list], list[Document | None]]  # None for a blank document


class RowStream(Protocol):
    """An endless, resumable stream of rows."""

    rows: int  # written so far

    def write(self, row: Row) -> None:
        """Write the next row: `input_ids` and, if the stream has them, unshifted `labels`, each (max_length + 1,)."""

    def state_dict(self) -> dict[str, np.ndarray]: ...

    def load_state_dict(self, state: State) -> None: ...


class StreamMaker(Protocol):
    """Creates the stream of a number. Must be picklable where processes are not forked."""

    widths: dict[str, int]  # of the arrays that its streams write

    def __call__(self, stream: int) -> RowStream: ...


class TextStream:
    """Rows of documents, best-fit packed and cropped.

    The state holds the ids of the documents in the buffer: nothing is read or encoded again.
    """

    def __init__(self, documents: ShuffledDocuments | StreamedDocuments, encode: Encode, capacity: int):
        self.documents, self.encode, self.capacity = documents, encode, capacity
        self.buffer: Buffer[np.ndarray] = Buffer(self.encoded(), documents.chunk_size // 2)
        self.fingerprint = np.array([capacity, *documents.fingerprint])
        self.rows = 0

    def encoded(self) -> Iterator[list[Document]]:
        for documents in self.documents:
            yield [document for document in self.encode(documents) if document is not None]

    def write(self, row: Row) -> None:
        fill_with_documents(self.buffer, row["input_ids"])
        if "labels" in row:
            row["labels"][:] = row["input_ids"]
        self.rows += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        waiting = self.buffer.waiting
        return {
            "fingerprint": self.fingerprint,
            "rows": np.array(self.rows),
            "lengths": np.array([length for length, _, _ in waiting], dtype=np.int64),
            "tokens": np.concatenate([np.empty(0, np.uint32), *(ids for _, _, ids in waiting)]).astype(np.int32),
            **self.documents.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        check_fingerprint(self.fingerprint, state)
        self.rows = int(state["rows"])
        ends = np.cumsum(np.minimum(state["lengths"], self.capacity))
        documents = np.split(state["tokens"].astype(np.uint32), ends)
        for length, ids in zip(state["lengths"].tolist(), documents, strict=False):  # the last split is empty
            self.buffer.add(length, ids)
        self.documents.load_state_dict(state)


class ConversationStream:
    """Rows of uncropped conversations, best-fit packed and padded."""

    def __init__(
        self, conversations: Sequence[Conversation], sampler: StridedSampler, pad_token_id: int, capacity: int
    ):
        self.conversations, self.sampler, self.pad_token_id = conversations, sampler, pad_token_id
        self.chunk_size = chunk_size(len(conversations), sampler.streams, CONVERSATIONS)
        self.buffer: Buffer[tuple] = Buffer(self.sampled(), self.chunk_size // 2)
        self.fingerprint = np.array([capacity, len(conversations), sampler.epochs.seed])
        self.rows = 0

    def sampled(self) -> Iterator[list[tuple[int, tuple]]]:
        while True:
            yield [self.indexed(index) for index in self.sampler.take(self.chunk_size)]

    def indexed(self, index: int) -> tuple[int, tuple]:
        ids, mask = self.conversations[index]
        return len(ids), (ids, mask, index)

    def write(self, row: Row) -> None:
        fill_with_conversations(self.buffer, row["input_ids"], row["labels"], self.pad_token_id)
        self.rows += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            "fingerprint": self.fingerprint,
            "rows": np.array(self.rows),
            "waiting": np.array([item[2] for _, _, item in self.buffer.waiting], dtype=np.int64),
            "cursor": np.array(self.sampler.cursor),
        }

    def load_state_dict(self, state: State) -> None:
        check_fingerprint(self.fingerprint, state)
        self.rows, self.sampler.cursor = int(state["rows"]), int(state["cursor"])
        for index in state["waiting"].tolist():
            self.buffer.add(*self.indexed(index))


class MixedStream:
    """A row of `other` after every `every` rows of `usual`; the first cycle starts at its row `first`."""

    def __init__(self, usual: RowStream, other: RowStream, every: int, first: int):
        self.usual, self.other, self.every, self.first = usual, other, every, first

    @property
    def rows(self) -> int:
        return self.usual.rows + self.other.rows

    def write(self, row: Row) -> None:
        position = (self.rows + self.first) % (self.every + 1)
        (self.other if position == self.every else self.usual).write(row)

    def state_dict(self) -> dict[str, np.ndarray]:
        states = {"usual": self.usual.state_dict(), "other": self.other.state_dict()}
        state = {f"{stream}.{name}": value for stream, values in states.items() for name, value in values.items()}
        return {"rows": np.array(self.rows), **state}

    def load_state_dict(self, state: State) -> None:
        self.usual.load_state_dict(below("usual.", state))
        self.other.load_state_dict(below("other.", state))


def below(prefix: str, state: State) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def check_fingerprint(fingerprint: np.ndarray, state: State) -> None:
    """
    Raises:
        UserError: The state is from a run with other data.
    """
    if not np.array_equal(fingerprint, state["fingerprint"]):
        raise UserError(
            "the checkpoint was made with other data (number of documents, seed or max_length); resume with the files "
            "and settings it was made with, or start over"
        )


@dataclass
class TextStreams:
    """Streams of running text: `texts` has a column `text`, rows have `max_length` + 1 tokens."""

    texts: Dataset | IterableDataset
    tokenizer: PreTrainedTokenizerFast
    max_length: int
    seed: int = 0
    threads: int | None = None  # for encoding; None: by the number of cores
    cache: TokenCache | None = None

    @property
    def widths(self) -> dict[str, int]:
        return {"input_ids": self.max_length + 1}

    @cached_property
    def encoder(self) -> BulkEncoder:
        return BulkEncoder(self.tokenizer, self.threads)

    @cached_property
    def epochs(self) -> Epochs:
        if not any(is_text(text) for text in self.texts["text"]):  # or a stream would loop forever
            raise UserError("there is no text to train on, every document is empty; give other files")
        return Epochs(len(self.texts), self.seed)

    @cached_property
    def encoded(self) -> dict[int, Document | None]:
        """Cache of encoded documents by index, for small data sets."""
        return {}

    @cached_property
    def tokenized(self) -> TokenizedFile | None:
        """The ids of the whole data set, if it is cached."""
        return self.cache.open() if self.cache else None

    def __call__(self, stream: int) -> TextStream:
        if isinstance(self.texts, IterableDataset):
            shards: Shards = TextShards(self.texts)
            encode: Encode = self.encode
            if self.cache and shards.count >= STREAMS:  # otherwise every stream reads all shards
                _ = self.encoder  # created here once, not in the thread of each stream
                shards, encode = TokenizedShards(shards, self.ids, self.cache), self.shortened
            return TextStream(StreamedDocuments(shards, stream, STREAMS, self.seed), encode, self.max_length + 1)
        shuffled = ShuffledDocuments(StridedSampler(self.epochs, stream, STREAMS))
        return TextStream(shuffled, self.encode_at, self.max_length + 1)

    def fill_cache(self) -> None:
        """Tokenize a whole data set for the cache on all cores. Shards of a stream are cached when they are read."""
        if self.cache is None:
            return
        if isinstance(self.texts, Dataset):
            self.cache.tokenize(self.texts, replace(self, threads=os.cpu_count()).ids)
        elif self.texts.num_shards < STREAMS:
            few = f"{self.texts.num_shards} shards, fewer than the {STREAMS} streams; give more files"
            print(f"warning: tokenized_cache has no effect on streamed text of {few}", flush=True)

    def encode_at(self, indices: list[int]) -> list[Document | None]:
        """The documents at `indices`, which may repeat; small data sets are cached: every stream rereads them."""
        if self.tokenized:
            return self.shortened(self.tokenized[index] for index in indices)
        encoded = self.encoded if len(self.texts) <= FEW else {}
        missing = [index for index in dict.fromkeys(indices) if index not in encoded]
        if missing:
            encoded.update(zip(missing, self.encode(self.texts[missing]["text"]), strict=True))
        return [encoded[index] for index in indices]

    def encode(self, texts: list[str | None]) -> list[Document | None]:
        return self.shortened(self.ids(texts))

    def ids(self, texts: list[str | None]) -> Iterator[Ids]:
        """The ids of each document at full length; None for a blank one."""
        encoder = self.encoder
        batches = groups([text for text in texts if is_text(text)])
        encoded = (ids for batch in batches for ids in encoder.encode(batch))
        return (next(encoded) if is_text(text) else None for text in texts)

    def shortened(self, documents: Iterable[Ids]) -> list[Document | None]:
        """The full lengths, which packing needs, and at most one row of ids each."""
        most = self.max_length + 1
        return [
            None if ids is None else (len(ids), ids if len(ids) <= most else ids[:most].copy()) for ids in documents
        ]


def groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in groups, to limit the memory of their ids."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(map(len, group)) >= CHARACTERS_AT_ONCE:
            yield group
            group = []
    yield group


@dataclass
class ConversationStreams:
    """Streams of conversations from `recipes.training.data.conversations.render`, which fit a row.

    Raises:
        UserError: There is none, or one is longer than a row or has no token to train on after its first.
    """

    conversations: Sequence[Conversation]
    pad_token_id: int
    max_length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.conversations:
            raise UserError("there is no conversation to train on; give other files")
        for number, (ids, mask) in enumerate(self.conversations, start=1):
            if len(ids) > self.max_length + 1 or not np.any(mask[1:]):
                problem = f"conversation {number} has more than {self.max_length + 1} tokens or none to train on"
                raise UserError(f"{problem}; leave it out")

    @property
    def widths(self) -> dict[str, int]:
        return {"input_ids": self.max_length + 1, "labels": self.max_length + 1}

    @cached_property
    def epochs(self) -> Epochs:
        return Epochs(len(self.conversations), self.seed)

    def __call__(self, stream: int) -> ConversationStream:
        sampler = StridedSampler(self.epochs, stream, STREAMS)
        return ConversationStream(self.conversations, sampler, self.pad_token_id, self.max_length + 1)


@dataclass
class MixedStreams:
    """Streams of conversations with a row of text after every `replay_every` rows, offset differently per stream.

    Raises:
        UserError: `replay_every` is less than 1.
    """

    conversations: ConversationStreams
    texts: TextStreams
    replay_every: int

    def __post_init__(self) -> None:
        if self.replay_every < 1:
            raise UserError(
                f"replay_every {self.replay_every}: rows of conversations between rows of text; give at least 1"
            )

    @property
    def widths(self) -> dict[str, int]:
        return self.conversations.widths

    def __call__(self, stream: int) -> MixedStream:
        return MixedStream(self.conversations(stream), self.texts(stream), self.replay_every, first=stream)
