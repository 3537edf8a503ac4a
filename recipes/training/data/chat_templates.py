"""How any chat template's conversations become token ids, with a mask of the tokens that the assistant writes.

This project's own template marks them by its `{% generation %}` blocks. Of another, the first of four ways is taken
that marks exactly what follows the template's own generation prompts, up to the token that ends the turn:

1. its own blocks, if it has any;
2. the blocks of TRL's training version of a template that it knows: Qwen3's, which drops thoughts of earlier turns;
3. the differences between renderings: what each message of the assistant adds to the prompt for it;
4. such differences in TRL's version: Qwen3.5's, whose prompts begin with a thought.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, has_generation_markers, supports_tool_calling

from modeling_nanochat.chat.self_check import check_renderings
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import has_control_tokens, whole_messages

Rendering = Callable[[dict], tuple[np.ndarray, np.ndarray]]
PROBE = [
    {"role": "user", "content": "What is 12*7?"},
    {"role": "assistant", "content": "It is 84."},
    {"role": "user", "content": "And 12*8?"},
    {"role": "assistant", "content": "It is 96."},
]


def rendering_of(tokenizer: PreTrainedTokenizerFast) -> Rendering:
    """A function from a conversation {"messages", "tools"?} to ids (n,) and mask (n,) of what the assistant writes.

    It raises [`UserError`] for a conversation that the template cannot render as it is.

    Raises:
        UserError: The template marks other tokens than those that the assistant writes, or none of the ways works.
    """
    if has_control_tokens(tokenizer):
        check_renderings(tokenizer)
        return Blocks(tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            f"{name_of(tokenizer)}: the tokenizer has no chat template to render conversations with; set its "
            "`chat_template`, or take a model that has one"
        )
    other = trl_template(tokenizer)
    ways: list[Blocks | Differences] = [Blocks(tokenizer)] if has_generation_markers(tokenizer.chat_template) else []
    ways += [Blocks(tokenizer, other)] if other else []
    ways += [Differences(tokenizer), *([Differences(tokenizer, other)] if other else [])]
    for rendering in ways:
        if marks_what_is_written(rendering, tokenizer):
            return OtherTemplate(tokenizer, rendering)
    raise UserError(
        f"{name_of(tokenizer)}: its chat template cannot be trained on: it renders turns of the assistant otherwise "
        "than its prompts begin them, or once more turns follow, or ends them with no special token; set another "
        "`chat_template`"
    )


def trl_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """TRL's training version of the tokenizer's template; None if there is none."""
    try:
        return get_training_chat_template(tokenizer)
    except (UserError, ValueError):  # the template fails on TRL's probe, or is none of those that TRL knows
        return None


def render_one(
    conversation: dict, tokenizer: PreTrainedTokenizerFast, template: str | None = None
) -> tuple[list[int], list[int]]:
    """Ids and mask by the `{% generation %}` blocks of `template`, default the tokenizer's."""
    rendered: Any = tokenizer.apply_chat_template(
        whole_messages(conversation["messages"]),
        tools=whole_messages(conversation.get("tools")),
        chat_template=template,
        tokenizer_kwargs={"verbose": False},  # the caller skips and reports long conversations
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return rendered["input_ids"], rendered["assistant_masks"]


class Blocks:
    """Renders by `template`, default the tokenizer's, whose `{% generation %}` blocks mark what is written."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None):
        self.tokenizer, self.template = tokenizer, template

    def __call__(self, conversation: dict) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = render_one(conversation, self.tokenizer, self.template)
        return np.array(ids), np.array(mask, dtype=bool)


class Differences:
    """Renders by `template`, default the tokenizer's; what an answer adds to the prompt for it is written."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None):
        self.tokenizer, self.template = tokenizer, template

    def __call__(self, conversation: dict) -> tuple[np.ndarray, np.ndarray]:
        messages = whole_messages(conversation["messages"])
        options: dict[str, Any] = {"tools": whole_messages(conversation.get("tools")), "chat_template": self.template}
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [messages[:i] for i in turns]
        prompts = text_of(self.tokenizer, asked, add_generation_prompt=True, **options) if turns else []
        *answered, text = text_of(self.tokenizer, [*(messages[: i + 1] for i in turns), messages], **options)
        for begin, end in zip(prompts, answered, strict=True):
            if not (end.startswith(begin) and text.startswith(end)):
                raise UserError("the chat template renders a turn of the assistant otherwise once more turns follow")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.array(encoded["offset_mapping"]).T
        mask = np.zeros(len(starts), dtype=bool)
        for begin, end in zip(prompts, answered, strict=True):
            mask[np.searchsorted(ends, len(begin), side="right") : np.searchsorted(starts, len(end))] = True
        return np.array(encoded["input_ids"]), mask


class OtherTemplate:
    """`rendering` of a template that is not this project's, with what such templates do silently ruled out.

    The mask ends with the special token that ends the turn: a line break that a template writes behind it is never
    generated. Calls and tools that a template would leave out are errors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rendering: Rendering):
        self.tokenizer, self.rendering = tokenizer, rendering
        self.special = special_ids(tokenizer)
        try:
            self.has_calls = supports_tool_calling(tokenizer)
        except UserError:  # from the process that renders templates of other origin
            self.has_calls = False

    def __call__(self, conversation: dict) -> tuple[np.ndarray, np.ndarray]:
        calls = conversation.get("tools") or any(message.get("tool_calls") for message in conversation["messages"])
        if calls and not self.has_calls:
            raise UserError("the chat template writes no tool calls; leave the row out, or take another model")
        ids, mask = self.rendering(conversation)
        return ids, up_to_special(ids, mask, self.special)


def text_of(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[list[dict]], **options: Any) -> list[str]:
    """The conversations as text; one call, because templates of other origin are rendered by another process."""
    rendered: Any = tokenizer.apply_chat_template(list(conversations), tokenize=False, **options)
    return rendered


def up_to_special(ids: np.ndarray, mask: np.ndarray, special: Sequence[int]) -> np.ndarray:
    """`mask` (n,) without what follows the last special token of each of its runs that has one."""
    kept = mask.copy()
    for run in runs(mask):
        found = np.flatnonzero(np.isin(ids[run], special))
        if len(found):
            kept[run.start + found[-1] + 1 : run.stop] = False
    return kept


def runs(mask: np.ndarray) -> list[slice]:
    """The runs of True in `mask` (n,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]


def marks_what_is_written(rendering: Blocks | Differences, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the runs that `rendering` marks in a conversation follow its prompts and end with a special token."""
    try:
        ids, mask = rendering({"messages": PROBE})
        asked = {"add_generation_prompt": True}
        prompts = text_of(tokenizer, [PROBE[:1], PROBE[:3]], chat_template=rendering.template, **asked)
        first = text_of(tokenizer, [PROBE[:1]], **asked)[0]
    except UserError:  # not rendered at all: the next way may
        return False
    special = special_ids(tokenizer)
    written = runs(up_to_special(ids, mask, special))
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers = zip(written, PROBE[1::2], strict=True)  # as many as prompts, by the first conditions
    return (
        prompts[0] == first
        and [run.start for run in written] == [len(prompt) for prompt in encoded]
        and all(ids[: len(prompt)].tolist() == prompt for prompt in encoded)
        and all(int(ids[run][-1]) in special for run in written)
        and all(answer["content"] in tokenizer.decode(ids[run]) for run, answer in answers)
    )


def end_of_turn(rendering: Rendering) -> int:
    """The id of the token that ends the assistant's turns."""
    ids, mask = rendering({"messages": PROBE})
    return int(ids[runs(mask)[0]][-1])  # behind the last turn, some templates write the end of the text too


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]


def name_of(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or "this tokenizer"
