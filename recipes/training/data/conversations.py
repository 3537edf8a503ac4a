"""Conversations from files, as token ids with a mask of the tokens to train on."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from evals.tasks.table import to_conversation
from modeling_nanochat.chat.self_check import check_renderings
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import expand, read_jsonl
from modeling_nanochat.tokenization_nanochat import whole_messages

from .packing import Conversation


def read_conversations(patterns: Sequence[str], what: str = "train_files", first: int | None = None) -> list[dict]:
    """Conversations {"messages"} from JSONL files of conversations, GSM8K, ARC or MMLU records.

    Args:
        patterns: Local files, or shell patterns.
        what: Name of the setting, for errors.
        first: Read only the first records of each file, to check that it is readable; None: all records.

    Raises:
        UserError: A file is missing or empty, or a line is bad; the message names file and line.
    """
    conversations = []
    for name in expand(patterns, what):
        if Path(name).suffix != ".jsonl":
            raise UserError(f"{what}: {name} is not a .jsonl file; write one conversation per line")
        before = len(conversations)
        lines = islice(read_jsonl(name, arrays_are="messages"), first)  # arrays: the original's format
        conversations += [to_conversation(record, f"{name}:{line}") for line, record in lines]
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
    """Ids (n,) uint32 and mask (n,) bool of each conversation, by the chat template and its `{% generation %}` blocks.

    Skips conversations of more than `max_length` tokens and those without a token to train on; prints both counts.

    Raises:
        UserError: None is left, or the template marks other tokens than those the assistant writes.
    """
    check_renderings(tokenizer)
    rendered, too_long, unanswered = [], 0, 0
    hidden = None if show_progress else True  # None: tqdm shows it only on a terminal
    options = {"desc": "rendering", "unit": " conversations", "mininterval": 1, "leave": False, "disable": hidden}
    for conversation in tqdm(conversations, **options):
        ids, mask = render_one(conversation, tokenizer)
        too_long += len(ids) > max_length
        unanswered += not any(mask)
        if len(ids) <= max_length and any(mask):
            trained = mask if assistant_only_loss else [0] + [1] * (len(ids) - 1)
            rendered.append((np.array(ids, dtype=np.uint32), np.array(trained, dtype=bool)))
    if show_progress and (too_long or unanswered):
        print(f"left out: {too_long} conversations of more than {max_length} tokens, {unanswered} without an answer")
    if not rendered:
        raise UserError(
            f"none of {len(conversations)} conversations fits into max_length {max_length} with an answer; "
            "raise max_length"
        )
    return rendered


def render_one(conversation: dict, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    rendered = tokenizer.apply_chat_template(
        whole_messages(conversation["messages"]),
        tools=whole_messages(conversation.get("tools")),
        tokenizer_kwargs={"verbose": False},  # the caller skips and reports long conversations
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return rendered["input_ids"], rendered["assistant_masks"]
