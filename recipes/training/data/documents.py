"""The endless order of documents: reshuffled every epoch by seed, and sharded across streams.

Every cursor can be saved and restored.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import encode_documents

from .shards import BYTES_AHEAD, ReadAhead, Shards, is_text

CHUNK_SIZE = 128  # documents that a stream reads and encodes at a time
CONVERSATIONS = 32  # the same for conversations: more would hardly reduce padding (0.8 % at 512 tokens per row)
SAMPLED, SAMPLED_CHARACTERS = 64, 2000  # sampled documents, and characters of each, to estimate bytes per token
State = Mapping[str, np.ndarray]


class Epochs:
    """The endless sequence of the indices 0 ... size - 1, reshuffled every epoch.

    An epoch's order is that of `datasets.Dataset.shuffle(seed + epoch)`.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.kept: dict[int, np.ndarray] = {}  # streams are never far apart: two orders are enough

    def order(self, epoch: int) -> np.ndarray:
        if epoch not in self.kept:
            self.kept = {old: order for old, order in self.kept.items() if abs(old - epoch) == 1}
            self.kept[epoch] = np.random.default_rng(self.seed + epoch).permutation(self.size)
        return self.kept[epoch]

    def __getitem__(self, position: int) -> int:
        return int(self.order(position // self.size)[position % self.size])


class StridedSampler:
    """One stream's share of an endless sequence: every `streams`-th index, starting at the stream's own."""

    def __init__(self, epochs: Epochs, index: int, streams: int):
        self.epochs, self.cursor, self.streams = epochs, index, streams

    def take(self, count: int) -> list[int]:
        end = self.cursor + count * self.streams
        indices = [self.epochs[position] for position in range(self.cursor, end, self.streams)]
        self.cursor = end
        return indices


def out_of_reach(texts: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> str | None:
    """A warning if rows can hold less than half of the text, because only the start of each document fits a row.

    Estimated from the documents' bytes and the bytes per token of a few samples; else, and for a stream, None.
    """
    if not isinstance(texts, Dataset):
        return None
    chunks = texts.data.column("text").chunks
    sizes = np.concatenate([np.zeros(1), *(pc.binary_length(chunk).drop_null().to_numpy() for chunk in chunks)])
    beginnings = [text[:SAMPLED_CHARACTERS] for text in islice(filter(is_text, texts["text"]), SAMPLED)]
    tokens = sum(len(ids) - 1 for ids in encode_documents(tokenizer, beginnings))
    fits = max_length * sum(len(text.encode("utf-8", "replace")) for text in beginnings) / max(tokens, 1)
    share = np.minimum(sizes, fits).sum() / max(sizes.sum(), 1)
    if share >= 0.5:
        return None
    return (
        f"train_files: only the first {max_length} tokens of a document fit a row: about {100 * share:.2g} % of the "
        "text can be trained on; split it into documents, in a .txt file by blank lines, or raise --max_length"
    )


def chunk_size(documents: int, streams: int, most: int = CHUNK_SIZE) -> int:
    """Documents that a stream reads at a time, capped so that all streams together never read past one epoch."""
    return max(8, min(most, documents // (2 * streams)))


class ShuffledDocuments:
    """A stream's documents of a `datasets.Dataset`, as chunks of indices."""

    def __init__(self, sampler: StridedSampler):
        self.sampler = sampler
        self.chunk_size = chunk_size(sampler.epochs.size, sampler.streams)
        self.fingerprint = [sampler.epochs.size, sampler.epochs.seed]

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.sampler.take(self.chunk_size)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"cursor": np.array(self.sampler.cursor)}

    def load_state_dict(self, state: State) -> None:
        self.sampler.cursor = int(state["cursor"])


class Position(NamedTuple):
    """A block of a stream.

    Attributes:
        shard: Number among the stream's own shards of the epoch.
        found: Whether the epoch has had a text, this block included.
    """

    epoch: int = 0
    shard: int = 0
    block: int = 0
    found: bool = False


class StreamedDocuments:
    """A stream's documents of shards that are read one after the other.

    The shards (files or row groups) are reshuffled every epoch and distributed across the streams; rows are shuffled
    in blocks of 1024. If there are fewer shards than streams, every stream reads all shards and keeps its rows of each
    block.
    """

    chunk_size = CHUNK_SIZE

    def __init__(self, shards: Shards, index: int, streams: int, seed: int):
        self.shards, self.index, self.streams, self.seed = shards, index, streams, seed
        self.fingerprint = [shards.count, seed]
        self.position, self.offset = Position(), 0  # of the next document

    def __iter__(self) -> Iterator[list]:
        with closing(ReadAhead(self.blocks(self.position), size)) as blocks:
            for position, documents in blocks:
                self.position = position
                while self.offset < len(documents):
                    chosen = documents[self.offset : self.offset + CHUNK_SIZE]
                    self.offset += len(chosen)
                    yield chosen
                self.offset = 0

    def blocks(self, position: Position) -> Iterator[tuple[Position, list]]:
        """Yield blocks from `position` on, shuffled, epoch after epoch."""
        epoch, first, block, found = position
        while True:
            own = self.own_shards(epoch)
            for shard in range(first, len(own)):
                for in_order in self.shards.read(own[shard], block):
                    documents = self.shuffled(in_order, [self.seed, epoch, own[shard], block])
                    found = found or any(document is not None for document in documents)
                    yield Position(epoch, shard, block, found), documents
                    block += 1
                block = 0
            if not found:
                raise UserError(
                    f"the streamed text has too few documents for {self.streams} streams; download it and give its "
                    "files"
                )
            epoch, first, found = epoch + 1, 0, False

    def shuffled(self, documents: list, seed: list[int]) -> list:
        """This stream's documents of a block, shuffled."""
        order = np.random.default_rng(seed).permutation(len(documents))
        if self.shards.count < self.streams:
            order = order[self.index :: self.streams]
        return [documents[i] for i in order]

    def own_shards(self, epoch: int) -> list[int]:
        """This stream's shards of the epoch."""
        order = np.random.default_rng(self.seed + epoch).permutation(self.shards.count)
        return (order[self.index :: self.streams] if len(order) >= self.streams else order).tolist()

    def state_dict(self) -> dict[str, np.ndarray]:
        epoch, shard, block, found = self.position
        return {"cursor": np.array([epoch, shard, block, self.offset, found], dtype=np.int64)}

    def load_state_dict(self, state: State) -> None:
        epoch, shard, block, self.offset, found = state["cursor"].tolist()
        self.position = Position(epoch, shard, block, bool(found))


def size(block: tuple[Position, list]) -> int:
    """Bytes of the block's texts or ids, if a character takes one; at least an eighth of what is read ahead."""
    total = sum(getattr(document, "nbytes", len(document)) for document in block[1] if document is not None)
    return max(total, BYTES_AHEAD // 8)
