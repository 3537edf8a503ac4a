"""Conversations from files, as token ids with a mask of the tokens to train on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from evals.tasks.table import to_conversation
from modeling_nanochat.chat.self_check import check_renderings
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_records
from modeling_nanochat.tokenization_nanochat import whole_messages

from .packing import Conversation


def read_conversations(names: Sequence[str], what: str = "train_files", first: int | None = None) -> list[dict]:
    """Conversations {"messages", "tools"?} from records of conversations, GSM8K, ARC or MMLU.

    Args:
        names: Files, patterns, folders and Hub ids, as for `modeling_nanochat.text.records.read_records`.
        what: Name of the setting, for errors.
        first: Read only the first records of each file, to check that it is readable; None: all records.

    Raises:
        UserError: A source is missing or empty, or a record is bad; the message names file and line.
    """
    records = read_records(names, what, arrays_are="messages", first=first)  # arrays: the original's format
    return [to_conversation(record, where) for where, record in records]


def render(
    conversations: Sequence[dict],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    *,
    assistant_only_loss: bool = True,
    show_progress: bool = True,
) -> list[Conversation]:
    """Ids (n,) uint32 and mask (n,) bool of each conversation, by the chat template and its `{% generation %}` blocks.

    Skips conversations of more than `max_length` tokens and those without a token to train on; prints both counts.

    Raises:
        UserError: None is left, or the template marks other tokens than those the assistant writes.
    """
    check_renderings(tokenizer)
    rendered: list[Conversation] = []
    too_long = unanswered = 0
    hidden = None if show_progress else True  # None: tqdm shows it only on a terminal
    shown = {"desc": "rendering", "unit": " conversations", "mininterval": 1, "leave": False}
    for conversation in tqdm(conversations, disable=hidden, **shown):
        ids, mask = render_one(conversation, tokenizer)
        too_long += len(ids) > max_length
        unanswered += not any(mask)
        if len(ids) <= max_length and any(mask):
            trained = mask if assistant_only_loss else [0] + [1] * (len(ids) - 1)
            rendered.append((np.array(ids, dtype=np.uint32), np.array(trained, dtype=bool)))
    if show_progress and (too_long or unanswered):
        print(f"left out: {too_long} conversations of more than {max_length} tokens, {unanswered} without an answer")
    if not rendered:
        raise UserError(nothing_to_train_on(len(conversations), too_long, unanswered, max_length))
    return rendered


def nothing_to_train_on(conversations: int, too_long: int, unanswered: int, max_length: int) -> str:
    """Why none of the conversations is left, and what to do."""
    if unanswered == conversations:
        return (
            f"none of {conversations} conversations has an answer of the assistant, so nothing would be trained on; "
            "add answers"
        )
    found = f"{too_long} of {conversations} conversations have more than max_length {max_length} tokens"
    if unanswered:
        return f"{found} and {unanswered} have no answer of the assistant; raise max_length or add answers"
    return f"{found}; raise max_length"


def render_one(conversation: dict, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    rendered: Any = tokenizer.apply_chat_template(
        whole_messages(conversation["messages"]),
        tools=whole_messages(conversation.get("tools")),
        tokenizer_kwargs={"verbose": False},  # the caller skips and reports long conversations
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return rendered["input_ids"], rendered["assistant_masks"]
