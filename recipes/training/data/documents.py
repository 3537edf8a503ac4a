"""The endless order of documents: reshuffled every epoch by seed, and sharded across streams.

Every cursor can be saved and restored.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TypeGuard

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line
from modeling_nanochat.tokenization_nanochat import encode_documents

CHUNK_SIZE = 128  # documents that a stream reads and encodes at a time
CONVERSATIONS = 32  # the same for conversations: more would hardly reduce padding (0.8 % at 512 tokens per row)
SAMPLED, SAMPLED_CHARACTERS = 64, 2000  # sampled documents, and characters of each, to estimate bytes per token
BLOCK = 1024  # rows of a streamed dataset that are shuffled together
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


def is_text(text: str | None) -> TypeGuard[str]:
    return bool(text and not text.isspace())


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


class StreamedDocuments:
    """A stream's texts of a `datasets.IterableDataset` with a column `text`.

    The dataset's shards (files or row groups) are reshuffled every epoch and distributed across the streams; rows are
    shuffled in blocks of 1024. If there are fewer shards than streams, every stream reads all shards and keeps its
    rows of each block.
    """

    chunk_size = CHUNK_SIZE

    def __init__(self, dataset: IterableDataset, index: int, streams: int, seed: int):
        self.dataset, self.index, self.streams, self.seed = dataset, index, streams, seed
        self.fingerprint = [dataset.num_shards, seed]
        self.epoch, self.shard, self.block, self.offset = 0, 0, 0, 0  # position of the next text
        self.shard_state: dict | None = None  # the library's, before that block
        self.found = False  # whether this epoch has had a text

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            for texts in self.blocks():
                while self.offset < len(texts):
                    chosen = texts[self.offset : self.offset + CHUNK_SIZE]
                    self.offset += len(chosen)
                    yield chosen
                self.block, self.offset = self.block + 1, 0

    def blocks(self) -> Iterator[list[str]]:
        """Yield the remaining blocks of this shard, then move to the start of the next shard."""
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.own_shards()[self.shard])
        if self.shard_state is not None:
            shard.load_state_dict(self.shard_state)
        rows = shard.iter(BLOCK)
        while True:
            self.shard_state = shard.state_dict()
            texts = next_texts(rows)
            if texts is None:
                break
            yield self.own_texts(texts)
        self.shard_state, self.shard, self.block = None, self.shard + 1, 0
        if self.shard == len(self.own_shards()):
            self.end_epoch()

    def own_shards(self) -> list[int]:
        """This stream's shards of the epoch."""
        order = np.random.default_rng(self.seed + self.epoch).permutation(self.dataset.num_shards)
        return (order[self.index :: self.streams] if len(order) >= self.streams else order).tolist()

    def own_texts(self, texts: list[str]) -> list[str]:
        shard = self.own_shards()[self.shard]
        order = np.random.default_rng([self.seed, self.epoch, shard, self.block]).permutation(len(texts))
        if self.dataset.num_shards < self.streams:
            order = order[self.index :: self.streams]
        texts = [texts[i] for i in order]
        self.found |= any(is_text(text) for text in texts)
        return texts

    def end_epoch(self) -> None:
        if not self.found:
            raise UserError(
                f"the streamed text has too few documents for {self.streams} streams; download it and give its files"
            )
        self.epoch, self.shard, self.found = self.epoch + 1, 0, False

    def state_dict(self) -> dict[str, np.ndarray]:
        cursor = [self.epoch, self.shard, self.block, self.offset, self.found]
        library = json.dumps(self.shard_state).encode()
        return {"cursor": np.array(cursor, dtype=np.int64), "part": np.frombuffer(library, dtype=np.uint8)}

    def load_state_dict(self, state: State) -> None:
        self.epoch, self.shard, self.block, self.offset, found = state["cursor"].tolist()
        self.shard_state, self.found = json.loads(state["part"].tobytes()), bool(found)


def next_texts(rows: Iterator[dict[str, list[str]]]) -> list[str] | None:
    try:
        batch = next(rows, None)
    except Exception as error:  # no network, a broken file: the libraries raise many types
        raise UserError(f"streaming the text failed ({first_line(error)}); resume when it can be read") from error
    return None if batch is None else batch["text"]
