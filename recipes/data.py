"""From files to rows: text and conversations as packed rows of token ids, dealt out over ranks and loader workers.

Whatever the source, the order is a function of the seed alone, and every epoch is shuffled anew.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from evals.formats import to_conversation
from modeling_nanochat.errors import UserError
from modeling_nanochat.sources import expand, read_jsonl, text_dataset
from modeling_nanochat.tokenization_nanochat import encode_documents

from .packing import Conversation, pack_conversations, pack_documents

DOCUMENTS_PER_BATCH = 128


class TextRows(IterableDataset):
    """Endless rows of `max_length` + 1 ids, packed from the documents of a `datasets.Dataset` with a column `text`."""

    def __init__(
        self,
        texts: Dataset,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ):
        self.texts, self.tokenizer, self.max_length = texts, tokenizer, max_length
        self.seed, self.rank, self.world_size, self.epochs = seed, rank, world_size, epochs

    def batches(self) -> Iterator[list[list[int]]]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        for epoch in count() if self.epochs is None else range(self.epochs):
            shuffled = self.texts.shuffle(seed=self.seed + epoch)
            mine = shuffled.shard(self.world_size * workers, self.rank * workers + worker_id, contiguous=False)
            empty = True
            for batch in mine.iter(DOCUMENTS_PER_BATCH):
                documents = [text for text in batch["text"] if text and text.strip()]
                if documents:
                    empty = False
                    yield encode_documents(self.tokenizer, documents)
            if empty:  # or the endless stream would wait for itself
                readers = f"{self.world_size} processes x {workers} loader workers"
                raise UserError(f"{len(self.texts)} documents are too few for {readers}; add text or use fewer")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for row in pack_documents(self.batches(), self.max_length + 1):
            ids = torch.tensor(row)
            yield {"input_ids": ids, "labels": ids}


class ConversationRows(IterableDataset):
    """Endless padded rows of `max_length` + 1 ids from rendered conversations; labels are -100 where nothing is learnt.

    `replay` mixes in rows of running text, `replay_every` rows apart, so that midtraining does not unlearn the corpus.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        pad_token_id: int,
        max_length: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        replay: TextRows | None = None,
        replay_every: int = 4,
    ):
        self.conversations, self.pad_token_id, self.max_length = conversations, pad_token_id, max_length
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.replay, self.replay_every = replay, replay_every

    def batches(self) -> Iterator[list[Conversation]]:
        if len(self.conversations) < self.world_size:
            raise UserError(f"{len(self.conversations)} conversations are too few for {self.world_size} processes; add more")
        for epoch in count():
            order = torch.randperm(len(self.conversations), generator=torch.Generator().manual_seed(self.seed + epoch))
            mine = order[self.rank :: self.world_size].tolist()
            for start in range(0, len(mine), DOCUMENTS_PER_BATCH):
                yield [self.conversations[i] for i in mine[start : start + DOCUMENTS_PER_BATCH]]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        text = iter(self.replay) if self.replay is not None else None
        rows = pack_conversations(self.batches(), self.max_length + 1, self.pad_token_id)
        for number, (ids, labels) in enumerate(rows, start=1):
            yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
            if text is not None and number % self.replay_every == 0:
                yield next(text)


def row_loader(rows: IterableDataset, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches {"input_ids", "labels"}, each LongTensor (batch_size, max_length + 1)."""
    pinned = torch.cuda.is_available()
    return DataLoader(rows, batch_size=batch_size, num_workers=num_workers, pin_memory=pinned, drop_last=True)


def read_conversations(patterns: Sequence[str], what: str = "train_files") -> list[dict]:
    """Conversations {"messages"} from JSONL files of conversations, GSM8K, ARC or MMLU records.

    Raises:
        UserError: No file, an empty one, or a bad line; names file and line.
    """
    conversations = []
    for name in expand(patterns, what):
        if Path(name).suffix != ".jsonl":
            raise UserError(f"{what}: {name} is not a .jsonl file; write one conversation a line")
        before = len(conversations)
        conversations += [to_conversation(record, f"{name}:{line}") for line, record in read_jsonl(name)]
        if len(conversations) == before:
            raise UserError(f"{what}: {name} has no conversation in it; fill it or leave it out")
    return conversations


def render(
    conversations: Sequence[dict],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    assistant_only_loss: bool = True,
    show_progress: bool = True,
) -> list[Conversation]:
    """Ids (n,) uint32 and mask (n,) bool of each conversation, by the chat template and its `{% generation %}` marks.

    Left out are conversations of more than `max_length` tokens and those without a learnt token; both are counted aloud.

    Raises:
        UserError: None is left.
    """
    rendered, too_long, silent = [], 0, 0
    for conversation in tqdm(conversations, desc="rendering", unit=" conversations", disable=not show_progress, mininterval=1):
        ids, mask = render_one(conversation, tokenizer)
        too_long += len(ids) > max_length
        silent += not any(mask)
        if len(ids) <= max_length and any(mask):
            learnt = mask if assistant_only_loss else [0] + [1] * (len(ids) - 1)
            rendered.append((np.array(ids, dtype=np.uint32), np.array(learnt, dtype=bool)))
    if show_progress and (too_long or silent):
        print(f"left out: {too_long} conversations of more than {max_length} tokens, {silent} without an answer")
    if not rendered:
        raise UserError(
            f"none of {len(conversations)} conversations fits into max_length {max_length} with an answer; raise max_length"
        )
    return rendered


def render_one(conversation: dict, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    rendered = tokenizer.apply_chat_template(
        conversation["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return rendered["input_ids"], rendered["assistant_masks"]


def load_text_rows(
    patterns: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int, what: str, **options
) -> TextRows:
    """[`TextRows`] over text files or a Hub dataset."""
    return TextRows(text_dataset(patterns, what=what), tokenizer, max_length, **options)
