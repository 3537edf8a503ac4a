"""Which document comes when: shuffled by seed, anew in every epoch, dealt out over streams, without end.

Every place can be written down and come back to.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line
from modeling_nanochat.tokenization_nanochat import encode_documents

CHUNK_SIZE = 128  # documents of a stream that are read and encoded at a time
CONVERSATIONS = 32  # the same for conversations: with more, padding hardly shrinks (0.8 % at 512 tokens a row)
SAMPLED, SAMPLED_CHARACTERS = 64, 2000  # documents and of each so much, to estimate bytes per token
BLOCK = 1024  # rows of a stream's part that are shuffled among themselves
State = Mapping[str, np.ndarray]


class Epochs:
    """The endless sequence of the indices 0 ... size - 1, epoch after epoch, each in an order of its own.

    An epoch's order is that of `datasets.Dataset.shuffle(seed + epoch)`.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.kept: dict[int, np.ndarray] = {}  # streams are never far apart: two epochs are enough

    def order(self, epoch: int) -> np.ndarray:
        if epoch not in self.kept:
            self.kept = {old: order for old, order in self.kept.items() if abs(old - epoch) == 1}
            self.kept[epoch] = np.random.default_rng(self.seed + epoch).permutation(self.size)
        return self.kept[epoch]

    def __getitem__(self, place: int) -> int:
        return int(self.order(place // self.size)[place % self.size])


class StridedSampler:
    """What falls to one stream of an endless sequence: every `streams`-th index, beginning with its own number."""

    def __init__(self, epochs: Epochs, index: int, streams: int):
        self.epochs, self.cursor, self.streams = epochs, index, streams

    def take(self, count: int) -> list[int]:
        end = self.cursor + count * self.streams
        indices = [self.epochs[place] for place in range(self.cursor, end, self.streams)]
        self.cursor = end
        return indices


def is_text(text: str | None) -> bool:
    return bool(text) and not text.isspace()


def out_of_reach(texts: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> str | None:
    """A line for the log where rows hold less than half of the text, for of each document only the beginning fits a row.

    Estimated from the documents' bytes and the bytes per token of a few beginnings; None where it is half or more, and for a stream.
    """
    if not isinstance(texts, Dataset):
        return None
    sizes = np.concatenate([np.zeros(1), *(pc.binary_length(part).drop_null().to_numpy() for part in texts.data.column("text").chunks)])
    beginnings = [text[:SAMPLED_CHARACTERS] for text in islice(filter(is_text, texts["text"]), SAMPLED)]
    tokens = sum(len(ids) - 1 for ids in encode_documents(tokenizer, beginnings))
    fits = max_length * sum(len(text.encode("utf-8", "replace")) for text in beginnings) / max(tokens, 1)
    share = np.minimum(sizes, fits).sum() / max(sizes.sum(), 1)
    if share >= 0.5:
        return None
    return (
        f"train_files: of a document only the first {max_length} tokens fit a row: about {100 * share:.2g} % of the text can be trained on; "
        "separate what are several documents, in a .txt file by blank lines, or raise --max_length"
    )


def chunk_size(documents: int, streams: int, most: int = CHUNK_SIZE) -> int:
    """Documents that a stream reads at a time: of few so few that all streams together stay within an epoch."""
    return max(8, min(most, documents // (2 * streams)))


class ShuffledDocuments:
    """A stream's documents of a `datasets.Dataset`, by index."""

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

    The parts of the stream (`num_shards`: files or row groups) are put in a new order for every epoch and dealt out over
    the streams; rows are shuffled in blocks of 1024. Of a stream with fewer parts than streams, every stream reads all and
    keeps its share of each block.
    """

    chunk_size = CHUNK_SIZE

    def __init__(self, dataset: IterableDataset, index: int, streams: int, seed: int):
        self.dataset, self.index, self.streams, self.seed = dataset, index, streams, seed
        self.fingerprint = [dataset.num_shards, seed]
        self.epoch, self.part, self.block, self.offset = 0, 0, 0, 0  # the next text: where in which block
        self.part_state: dict | None = None  # of the library, before that block
        self.found = False  # a text in this epoch

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            for texts in self.blocks():
                while self.offset < len(texts):
                    chosen = texts[self.offset : self.offset + CHUNK_SIZE]
                    self.offset += len(chosen)
                    yield chosen
                self.block, self.offset = self.block + 1, 0

    def blocks(self) -> Iterator[list[str]]:
        """The blocks that are left of this part; afterwards the place is the beginning of the next one."""
        part = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.parts()[self.part])
        if self.part_state is not None:
            part.load_state_dict(self.part_state)
        rows = part.iter(BLOCK)
        while True:
            self.part_state = part.state_dict()
            texts = next_texts(rows)
            if texts is None:
                break
            yield self.mine(texts)
        self.part_state, self.part, self.block = None, self.part + 1, 0
        if self.part == len(self.parts()):
            self.end_epoch()

    def parts(self) -> list[int]:
        """This stream's parts of the epoch."""
        order = np.random.default_rng(self.seed + self.epoch).permutation(self.dataset.num_shards)
        return (order[self.index :: self.streams] if len(order) >= self.streams else order).tolist()

    def mine(self, texts: list[str]) -> list[str]:
        part = self.parts()[self.part]
        order = np.random.default_rng([self.seed, self.epoch, part, self.block]).permutation(len(texts))
        if self.dataset.num_shards < self.streams:
            order = order[self.index :: self.streams]
        texts = [texts[i] for i in order]
        self.found |= any(is_text(text) for text in texts)
        return texts

    def end_epoch(self) -> None:
        if not self.found:
            raise UserError(f"the streamed text has too few documents for {self.streams} streams; download it and give its files")
        self.epoch, self.part, self.found = self.epoch + 1, 0, False

    def state_dict(self) -> dict[str, np.ndarray]:
        place = [self.epoch, self.part, self.block, self.offset, self.found]
        library = json.dumps(self.part_state).encode()
        return {"cursor": np.array(place, dtype=np.int64), "part": np.frombuffer(library, dtype=np.uint8)}

    def load_state_dict(self, state: State) -> None:
        self.epoch, self.part, self.block, self.offset, found = state["cursor"].tolist()
        self.part_state, self.found = json.loads(state["part"].tobytes()), bool(found)


def next_texts(rows: Iterator[dict[str, list[str]]]) -> list[str] | None:
    try:
        batch = next(rows, None)
    except Exception as error:  # no network, a broken file: the libraries raise many kinds
        raise UserError(f"streaming the text failed ({first_line(error)}); resume when it can be read") from error
    return None if batch is None else batch["text"]
