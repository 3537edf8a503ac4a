"""Token ids of text, kept on disk, so that text is tokenized once, however many epochs and runs read it.

A file holds the documents of one shard of a stream, or of a whole data set, at full length and in their order, in the
blocks in which streams are read. Its folder is named after everything that the ids depend on. A file under its final
name is complete. The format is Arrow's: `datasets` would convert a stream's shards only all at once.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError, one_line
from modeling_nanochat.folders import flush
from modeling_nanochat.text.sources import versions

from .shards import BLOCK, Shards

SPARE = 2 * 2**30  # bytes of the disk that are left to checkpoints
ABANDONED = 86400  # seconds without a write after which an unfinished file is removed
Ids = np.ndarray | None  # (n,) uint16 or uint32; None for a blank document
Encode = Callable[[list[str | None]], Iterable[Ids]]


class TokenizedFile:
    """The documents of a complete file, mapped into memory."""

    def __init__(self, path: Path):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.blocks = [reader.get_batch(number).column("ids") for number in range(reader.num_record_batches)]

    def __getitem__(self, index: int) -> Ids:
        return documents(self.blocks[index // BLOCK].slice(index % BLOCK, 1))[0]

    def read(self, first: int) -> Iterator[list[Ids]]:
        return map(documents, self.blocks[first:])


def documents(block: pa.LargeListArray) -> list[Ids]:
    ids = block.values.to_numpy()
    return [ids[start:end] if end > start else None for start, end in pairwise(block.offsets.to_pylist())]


class UnfinishedFile:
    """A file of the cache under a temporary name. After an error of the disk nothing more is written.

    The name is unique: streams in different epochs may write the same shard at once, also in one process.
    """

    def __init__(self, target: Path, dtype: np.dtype):
        self.target, self.path = target, target.with_name(f".{target.stem}.{uuid4().hex}.unfinished")
        self.dtype, self.failed = dtype, False
        self.writer: Any = None  # pyarrow's, which has no types

    def attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            if not self.failed:
                write(*arguments)
        except OSError as error:
            self.failed, self.writer = True, None  # an open file would keep its space
            print(f"warning: tokenized_cache: {self.target}: {one_line(error)}; going on without it", flush=True)
            self.remove()

    def add(self, block: list[Ids]) -> None:
        if shutil.disk_usage(self.target.parent).free < SPARE:
            raise OSError(f"less than {SPARE / 2**30:.0f} GiB of the disk are free")
        ids = np.concatenate([np.empty(0, self.dtype), *(ids.astype(self.dtype) for ids in block if ids is not None)])
        lengths = [0 if ids is None else len(ids) for ids in block]
        column = pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), ids)
        batch = pa.record_batch({"ids": column})
        self.writer = self.writer or pa.ipc.new_file(str(self.path), batch.schema)
        self.writer.write(batch)

    def complete(self) -> None:
        if self.writer:
            self.writer.close()
            flush(self.path)
            self.path.replace(self.target)

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink()


def written(blocks: Iterable[list[Ids]], file: UnfinishedFile) -> Iterator[list[Ids]]:
    """Yield the blocks, and write each after it was used."""
    try:
        for block in blocks:
            yield block
            file.attempt(file.add, block)
        file.attempt(file.complete)
    finally:
        file.remove()


class TokenCache:
    """The files of one text and tokenizer in `folder`, which is created.

    Args:
        vocab_size: Up to 65,536 an id takes two bytes, otherwise four.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.dtype = folder, np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".*.unfinished"):
                with suppress(FileNotFoundError):  # another process removes it, too
                    if time.time() - path.stat().st_mtime > ABANDONED:
                        path.unlink()
        except OSError as error:
            raise UserError(f"tokenized_cache: {folder} is not writable ({one_line(error)}); give another") from error

    def open(self, shard: int = 0) -> TokenizedFile | None:
        """The file of `shard`; None if it is missing or damaged."""
        try:
            return TokenizedFile(self.folder / f"{shard}.arrow")
        except (OSError, pa.ArrowInvalid):
            return None

    def keep(self, blocks: Iterable[list[Ids]], shard: int = 0) -> Iterator[list[Ids]]:
        """Yield the blocks of `shard`, and write them to its file; if the disk is full, only yield them."""
        return written(blocks, UnfinishedFile(self.folder / f"{shard}.arrow", self.dtype))

    def tokenize(self, texts: Dataset, encode: Encode) -> None:
        """Write the file of all `texts`, unless it is there."""
        if self.open() is None:
            print(f"tokenizing {len(texts):,} documents for {self.folder}", flush=True)
            file = UnfinishedFile(self.folder / "0.arrow", self.dtype)
            for _ in written((list(encode(batch["text"])) for batch in texts.iter(BLOCK)), file):
                if file.failed:  # the rest would be tokenized for nothing
                    return


class TokenizedShards:
    """The ids of `texts`, from the cache or else encoded and kept there."""

    def __init__(self, texts: Shards, encode: Encode, cache: TokenCache):
        self.texts, self.encode, self.cache, self.count = texts, encode, cache, texts.count

    def read(self, shard: int, first: int = 0) -> Iterator[list[Ids]]:
        if kept := self.cache.open(shard):
            return kept.read(first)
        blocks = (list(self.encode(block)) for block in self.texts.read(shard, first))
        return self.cache.keep(blocks, shard) if first == 0 else blocks


def token_cache(
    folder: str | Path, texts: Dataset | IterableDataset, names: list[str], tokenizer: PreTrainedTokenizerFast
) -> TokenCache:
    """The cache below `folder` for these `texts`, read from the sources `names`, and this tokenizer.

    Raises:
        UserError: The folder is not writable, or the Hub does not tell the commit of its data.
    """
    whole = isinstance(texts, Dataset)
    source = texts._fingerprint if whole else f"{texts.num_shards} {versions(names, 'train_files')}"
    parts = [source, tokenizer.backend_tokenizer.to_str(), str(tokenizer.bos_token_id), str(BLOCK)]
    name = sha256("\n".join(parts).encode()).hexdigest()[:16]
    return TokenCache(Path(folder).expanduser() / name, len(tokenizer))
