"""Conversations from files, as token ids with a mask of the tokens to train on."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from evals.tasks.table import to_conversation, unread_fields
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import unread_keys
from modeling_nanochat.text.records import Record, read_records
from modeling_nanochat.tokenization_nanochat import has_control_tokens

from .bad_rows import BadRows, OnBadRow
from .chat_templates import rendering_of
from .packing import Conversation
from .workers import ordered_map, workers_here


def read_conversations(
    names: Sequence[str],
    what: str = "train_files",
    first: int | None = None,
    format: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> list[dict]:
    """Conversations {"messages", "tools"?} from records of conversations, GSM8K, ARC or MMLU, to check them.

    Args:
        names: Files, patterns, folders and Hub ids, as for `modeling_nanochat.text.records.read_records`.
        what: Name of the setting, for errors.
        first: Read only the first records of each file, to check that it is readable; None: all records.
        format: One of `evals.tasks.table.FORMATS`; None: told by the fields of each record.
        on_bad_row: Whether a bad record is an error or left out.

    Raises:
        UserError: A source is missing or empty, or a record is bad; the message names file and line.
    """
    bad_rows, conversations = BadRows(on_bad_row), []
    for where, record in read_records(names, what, arrays_are="messages", first=first):
        try:
            conversations.append(to_conversation(record, where, format))
        except UserError as error:
            bad_rows.add(where, error)
    return conversations


@dataclass(frozen=True)
class RenderedRow:
    """What has become of a record: a conversation, or why it is left out."""

    where: str
    conversation: Conversation | None
    unread: set[str]  # fields
    too_long: bool = False
    error: UserError | None = None


@dataclass
class Renderer:
    """Renders records by the chat template, with a mask of what the assistant writes; `chat_templates` says how.

    Raises:
        UserError: The template marks other tokens than those the assistant writes, or cannot be trained on.
    """

    tokenizer: PreTrainedTokenizerFast
    max_length: int  # tokens
    assistant_only_loss: bool = True  # False: all tokens are trained on
    on_bad_row: OnBadRow = "error"
    show_progress: bool = True

    def __post_init__(self) -> None:
        self.rendering = rendering_of(self.tokenizer)
        # Templates of other origin are rendered by a process of their own, which forks cannot share
        self.workers = workers_here() if has_control_tokens(self.tokenizer) else 0

    def __call__(
        self, records: Iterable[tuple[str, Record]], name: str, format: str | None = None
    ) -> list[Conversation | None]:
        """Ids (n,) uint32 and mask (n,) bool of each record; None for those that are left out.

        The texts are read one by one and not kept. What is left out is printed by reason, and fields that are not read
        are named once: conversations of more than `max_length` tokens are always left out, bad rows if `on_bad_row` is
        "skip".

        Args:
            records: Where each record is, for errors, and the record, as from `read_records`.
            name: Name of the source, for what is printed.
            format: As in [`read_conversations`].

        Raises:
            UserError: A record is bad; the message names file and line.
        """
        bad_rows, unread = BadRows(self.on_bad_row), set[str]()
        hidden = None if self.show_progress else True  # None: tqdm shows it only on a terminal
        shown: dict[str, Any] = {"desc": "rendering", "unit": " conversations", "mininterval": 1, "leave": False}
        rendered: list[Conversation | None] = []
        with closing(ordered_map(partial(self.row, format=format), records, self.workers)) as rows:
            for row in tqdm(rows, disable=hidden, **shown):
                unread |= row.unread
                rendered.append(row.conversation)
                if row.too_long:
                    bad_rows.count(row.where, f"more than max_length {self.max_length} tokens")
                elif row.error:
                    bad_rows.add(row.where, row.error)
        if self.show_progress:
            for line in bad_rows.summary():
                print(f"{name}: {line}")
            if unread:
                print(f"{name}: fields that are not read: {', '.join(sorted(unread))}")
        return rendered

    def row(self, place_and_record: tuple[str, Record], format: str | None) -> RenderedRow:
        """One record rendered; runs in a worker if there are many."""
        where, record = place_and_record
        unread = set[str]()
        try:
            conversation = to_conversation(record, where, format)
            unread |= unread_fields(record, format)
            unread |= {f"messages[].{key}" for key in unread_keys(conversation["messages"])}
            rendered = self.render(conversation, where)
        except UserError as error:
            return RenderedRow(where, None, unread, error=error)
        return RenderedRow(where, rendered, unread, too_long=rendered is None)

    def render(self, conversation: dict, where: str) -> Conversation | None:
        """One conversation; None if it is too long.

        Raises:
            UserError: It has nothing to train on, or the chat template cannot render it.
        """
        try:
            ids, mask = self.rendering(conversation)
        except UserError as error:  # of a template that is not this project's
            raise UserError(f"{where}: {error}") from error
        if len(ids) > self.max_length:
            return None
        silent = weightless(conversation["messages"], mask, where)
        if not np.any(mask & ~silent):
            raise UserError(f"{where}: no answer of the assistant to train on; add one, or leave the row out")
        trained = mask if self.assistant_only_loss else np.arange(len(ids)) > 0
        return ids.astype(np.uint32), trained & ~silent


def weightless(messages: Sequence[dict], mask: np.ndarray, where: str) -> np.ndarray:
    """Tokens (n,) bool of the assistant's messages with `weight` 0, which are not trained on.

    The k-th run of marked tokens is the assistant's k-th message: between two of them others write.

    Raises:
        UserError: The chat template marks another number of runs.
    """
    silent = [message.get("weight") == 0 for message in messages if message["role"] == "assistant"]
    if not any(silent):
        return np.zeros(len(mask), dtype=bool)
    run = np.cumsum(np.diff(mask, prepend=False) & mask)  # from 1 on, at marked tokens
    if run[-1] != len(silent):
        raise UserError(f"{where}: this chat template does not separate the answers, which `weight` needs; remove it")
    return mask & np.array([False, *silent])[run]
