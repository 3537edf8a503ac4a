"""One reply while it is generated: its events, the codec between text and ids, and the state of the turn."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..text.conversations import call_message
from ..tokenization_nanochat import (
    disable_special_tokens,
    escaped,
    special_token_ids,
    whole_characters,
    whole_messages,
)
from .sampling import SamplingOptions

MAX_TOOL_CALLS = 8
REPLACEMENT_CHARACTER = "\ufffd"  # what an incomplete UTF-8 sequence is decoded to


@dataclass(frozen=True)
class TextDelta:
    """More of the reply's text; complete characters only."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The model asked for `code` to be run; its [`ToolResult`] follows."""

    code: str


@dataclass(frozen=True)
class ToolResult:
    output: str


@dataclass(frozen=True)
class Finished:
    """The turn's messages, `[assistant(tool_calls), tool, ..., assistant]`; `finish_reason` is `stop` or `length`."""

    messages: list[dict[str, Any]]
    finish_reason: str


Event = TextDelta | ToolCall | ToolResult | Finished


class ChatCodec:
    """Converts text to ids and back; no text, neither a user's nor a tool's, becomes a control token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = special_token_ids(tokenizer)
        self.python_start, self.python_end = ids["<|python_start|>"], ids["<|python_end|>"]
        self.output_start, self.output_end = ids["<|output_start|>"], ids["<|output_end|>"]
        self.stop = {ids["<|assistant_end|>"], ids["<|bos|>"]}
        self.tokenizer = tokenizer
        # A copy, because the flag is tokenizer state and other threads may render prompts meanwhile.
        self.text_tokenizer = disable_special_tokens(copy.deepcopy(tokenizer.backend_tokenizer))

    def encode(self, text: str) -> list[int]:
        text = escaped(whole_characters(text), self.text_tokenizer)
        return self.text_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], control_tokens: bool = False) -> str:
        """The text of `ids`; control tokens are left out, or spelled out with `control_tokens`."""
        return self.text_tokenizer.decode(ids, skip_special_tokens=not control_tokens)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        quiet = {"verbose": False}  # the engine itself checks the length
        render = self.tokenizer.apply_chat_template
        messages = whole_messages(messages)
        ids = render(messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet)
        return cast("list[int]", ids)  # of all that this function may return


def chat_codec(tokenizer: PreTrainedTokenizerBase) -> ChatCodec:
    where = tokenizer.name_or_path or "this model"
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; take a model after midtraining, SFT or GRPO")
    try:
        return ChatCodec(tokenizer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@dataclass
class Turn:
    """State of one reply: its messages so far, the open code, the tokens still to be forced.

    `ids` holds the reply's tokens, and `sampled` whether the model chose each one (False: forced).
    """

    codec: ChatCodec
    tool: Callable[[str], str | Future[str]] | None  # a future: the turn pauses until it is done
    max_length: int
    max_tool_calls: int = MAX_TOOL_CALLS
    options: SamplingOptions = field(default_factory=SamplingOptions)
    prompt: Sequence[int] = ()
    live: bool = False  # decode text token by token, for streaming
    seen: set[int] = field(init=False)  # ids of the prompt and of the reply
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    forced: deque[int] = field(default_factory=deque)
    code: list[int] | None = None  # tokens since <|python_start|>; None outside of a call
    unread: list[int] = field(default_factory=list)  # tokens of text not yet decoded
    held: str = ""  # decoded text with which a stop string may begin
    text: str = ""
    tool_calls: int = 0
    pending: tuple[str, Future[str]] | None = None  # a call whose result is still to come
    generator: torch.Generator | None = None  # for samples that do not depend on the other rows

    def __post_init__(self) -> None:
        self.seen = set(self.prompt)

    def advance(self, sampled: int) -> Iterator[Event]:
        """Append the next token, `sampled` unless one is forced, and yield the resulting events."""
        forced = bool(self.forced)
        token = self.forced.popleft() if forced else sampled
        self.ids.append(token)
        self.sampled.append(not forced)
        self.seen.add(token)
        if not forced:
            yield from self.read(token)
        if self.finish_reason is None and len(self.ids) >= self.max_length:
            self.finish_reason = "length"
        if self.live or self.options.stop_strings or self.finish_reason:
            yield from self.new_text(final=self.code is not None or self.finish_reason is not None)
        if self.finish_reason:
            self.messages.append({"role": "assistant", "content": self.text})
            yield Finished(self.messages, self.finish_reason)

    @property
    def is_running(self) -> bool:
        return self.finish_reason is None and self.pending is None

    def cancel(self) -> None:
        """End the turn where it is; it has no `Finished`."""
        self.finish_reason = "cancelled"

    def read(self, token: int) -> Iterator[Event]:
        """Process a token that the model chose."""
        if token in self.codec.stop:
            self.finish_reason = "stop"
        elif token == self.codec.python_end:
            yield from self.close_call()
        elif token == self.codec.python_start and self.tool is not None:
            self.code = []
        elif self.code is not None:
            self.code.append(token)
        else:
            self.unread.append(token)

    def close_call(self) -> Iterator[Event]:
        """Run the open call and queue its result; do nothing without an open call, code or a tool."""
        code, self.code = self.codec.decode(self.code or [], control_tokens=True), None
        if not code or self.tool is None:
            return
        if self.tool_calls == self.max_tool_calls:
            self.finish_reason = "length"
            return
        self.tool_calls += 1
        yield from self.new_text(final=True)
        yield ToolCall(code)
        output = self.tool(code)
        if isinstance(output, Future):
            self.pending = code, output
        else:
            yield from self.write_result(code, output)

    def resume(self) -> Iterator[Event]:
        """Go on after a call whose result was still to come."""
        if self.pending is not None:
            (code, output), self.pending = self.pending, None
            yield from self.write_result(code, output.result())

    def write_result(self, code: str, output: str) -> Iterator[Event]:
        self.forced.extend([self.codec.output_start, *self.codec.encode(output), self.codec.output_end])
        self.messages += [call_message(self.text, code), {"role": "tool", "name": "python", "content": output}]
        self.text = ""
        yield ToolResult(output)

    def new_text(self, final: bool) -> Iterator[TextDelta]:
        """Decode the text read since the last call, up to a stop string, which ends the turn.

        Unless `final`, wait while the last character is incomplete, and hold back what may begin a stop string.
        """
        delta = self.codec.decode(self.unread) if self.unread else ""
        if delta.endswith(REPLACEMENT_CHARACTER) and not final:
            return
        self.unread.clear()
        text, self.held, stopped = split_at_stop(self.held + delta, self.options.stop_strings, final)
        if stopped:
            self.finish_reason = "stop"
        if text:
            self.text += text
            yield TextDelta(text)


def split_at_stop(text: str, stop_strings: Sequence[str], final: bool) -> tuple[str, str, bool]:
    """`text` before a stop string; its end, if that may begin one and is not `final`; whether one occurs."""
    found = [(start + len(stop), start) for stop in stop_strings if (start := text.find(stop)) >= 0]
    if found:  # the one that is complete first, however the tokens divide the text
        return text[: min(found)[1]], "", True
    begun = (n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
    end = len(text) - (0 if final else max(begun, default=0))
    return text[:end], text[end:], False
