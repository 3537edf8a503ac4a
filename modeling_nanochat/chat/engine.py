"""Generation with a KV cache and the python tool: one streamed turn, or many conversations at once.

Both run the same loop. Every row of the batch has a [`Turn`], which watches the row's tokens: between
`<|python_start|>` and `<|python_end|>` it collects code, runs it, and forces `<|output_start|>`result`<|output_end|>`
into the row in place of sampled tokens. A row ends with `<|assistant_end|>` or `<|bos|>`.

Unlike in the original's engine, prompts of a batch may differ (left padding), code that fails has its error as result,
and finished rows leave the batch.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..text.conversations import call_message
from ..tokenization_nanochat import (
    disable_special_tokens,
    escaped,
    special_token_ids,
    whole_characters,
    whole_messages,
)
from .decoding import CompiledDecoder, Decoder
from .python_tool import check_sandbox, run_python
from .sampling import Sampler, check_setting
from .self_check import check_cached_decoding, warn_of_untested_versions

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
        return render(messages, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet)


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
    tool: Callable[[str], str] | None
    max_length: int
    max_tool_calls: int = MAX_TOOL_CALLS
    live: bool = False  # decode text token by token, for streaming
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    forced: deque[int] = field(default_factory=deque)
    code: list[int] | None = None  # tokens since <|python_start|>; None outside of a call
    unread: list[int] = field(default_factory=list)  # tokens of text not yet decoded
    text: str = ""
    tool_calls: int = 0

    def advance(self, sampled: int) -> Iterator[Event]:
        """Append the next token, `sampled` unless one is forced, and yield the resulting events."""
        forced = bool(self.forced)
        token = self.forced.popleft() if forced else sampled
        self.ids.append(token)
        self.sampled.append(not forced)
        if not forced:
            yield from self.read(token)
        if self.finish_reason is None and len(self.ids) >= self.max_length:
            self.finish_reason = "length"
        if self.live or self.finish_reason:
            yield from self.new_text(final=self.code is not None or self.finish_reason is not None)
        if self.finish_reason:
            self.messages.append({"role": "assistant", "content": self.text})
            yield Finished(self.messages, self.finish_reason)

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
        """Run the open call and queue its result; do nothing without an open call or without code."""
        code, self.code = self.codec.decode(self.code or [], control_tokens=True), None
        if not code:
            return
        if self.tool_calls == self.max_tool_calls:
            self.finish_reason = "length"
            return
        self.tool_calls += 1
        yield from self.new_text(final=True)
        yield ToolCall(code)
        output = self.tool(code)
        self.forced.extend([self.codec.output_start, *self.codec.encode(output), self.codec.output_end])
        self.messages += [call_message(self.text, code), {"role": "tool", "name": "python", "content": output}]
        self.text = ""
        yield ToolResult(output)

    def new_text(self, final: bool) -> Iterator[TextDelta]:
        """Decode the text read since the last call; unless `final`, wait while its last character is incomplete."""
        delta = self.codec.decode(self.unread) if self.unread else ""
        if not delta or (delta.endswith(REPLACEMENT_CHARACTER) and not final):
            return
        self.unread.clear()
        self.text += delta
        yield TextDelta(delta)


class Engine:
    """A chat model with its python tool.

    Args:
        model: A causal language model; put into evaluation mode.
        tokenizer: Its tokenizer, with nanochat's control tokens and a chat template.
        tool: Runs code and returns its output; None: nothing is run, and code is treated as text.
        max_tool_calls: Maximum calls in a turn; one more ends it.
        compile: Compile the decoding step: slower to the first token, faster afterwards. One turn or batch at a time.

    Raises:
        UserError: The tokenizer is not a chat tokenizer, the python tool's sandbox is missing, or the model computes
            other logits with its cache than without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tool: Callable[[str], str] | None = run_python,
        max_tool_calls: int = MAX_TOOL_CALLS,
        compile: bool = False,
    ):
        if tool is run_python:
            check_sandbox()
        self.model = model.eval()
        self.codec = chat_codec(tokenizer)
        warn_of_untested_versions()
        check_cached_decoding(self.model)
        self.vocabulary = min(len(tokenizer), model.config.vocab_size)
        self.context = model.config.max_position_embeddings
        self.tool = tool
        self.max_tool_calls = max_tool_calls
        self.compile = compile
        self.compiled: CompiledDecoder | None = None

    def stream(
        self,
        messages: list[dict[str, Any]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_k: int | None = 50,
        seed: int | None = None,
    ) -> Iterator[Event]:
        """Generate the assistant's next turn; the last event is [`Finished`].

        Args:
            messages: The conversation, ending with the user's message.
            max_new_tokens: Maximum tokens of the turn, tool results included; at least 1.
            temperature: From 0, which always takes the most likely token, to 2.
            top_k: Sample among this many most likely tokens; 0 or None: among all.
            seed: Same seed, same reply; None: random.

        Raises:
            UserError: The conversation does not fit the model's context, or a setting is out of its range.
        """
        sampler = self.sampler(temperature, top_k, seed)
        prompt = self.codec.prompt(messages)
        turn = self.turn(prompt, max_new_tokens, live=True)
        for _, event in self.decode([prompt], [turn], sampler):
            yield event

    def generate_batch(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_k: int | None = 50,
        seed: int | None = None,
        batch_size: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The new messages of each conversation, as in [`Finished`]; other arguments as in `stream`.

        Args:
            batch_size: Conversations decoded at a time, grouped by length.
            progress: Called with 1 for each finished conversation, like `tqdm.update`.
        """
        sampler = self.sampler(temperature, top_k, seed)
        prompts = [self.codec.prompt(messages) for messages in conversations]
        return self.answer_prompts(prompts, sampler, max_new_tokens, batch_size, progress)

    def answer_prompts(
        self,
        prompts: Sequence[list[int]],
        sampler: Sampler,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], Any] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """`generate_batch` for prompts rendered by `codec.prompt`."""
        turns = [self.turn(prompt, max_new_tokens) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for _, event in self.decode([prompts[i] for i in rows], [turns[i] for i in rows], sampler):
                if progress is not None and isinstance(event, Finished):
                    progress(1)
        return [turn.messages for turn in turns]

    def fit(self, messages: list[dict[str, Any]], max_new_tokens: int = 256) -> list[dict[str, Any]]:
        """`messages` without the oldest turns, where needed to leave room for a reply; system messages stay.

        Raises:
            UserError: The last question alone leaves no room for a reply.
        """
        check_setting("max_new_tokens", max_new_tokens)
        system = [message for message in messages if message["role"] == "system"]
        rest = messages[len(system) :]
        room = self.context - min(max_new_tokens, self.context // 2)
        while (length := len(self.codec.prompt(system + rest))) > room:
            later = [i for i, message in enumerate(rest) if i > 0 and message["role"] == "user"]
            if not later:
                break
            rest = rest[later[0] :]
        if length >= self.context:
            question = sum(len(self.codec.encode(message["content"] or "")) for message in rest)
            fits = max(0, self.context - 1 - (length - question))
            raise UserError(f"the question itself is too long: {question} tokens, of which {fits} fit; shorten it")
        return system + rest

    def sampler(self, temperature: float, top_k: int | None, seed: int | None) -> Sampler:
        check_setting("seed", seed)
        generator = torch.Generator(device=self.model.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        return Sampler(temperature, top_k, generator)

    def turn(self, prompt: list[int], max_new_tokens: int, live: bool = False) -> Turn:
        check_setting("max_new_tokens", max_new_tokens)
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the model's context is {self.context}; shorten it"
            )
        return Turn(self.codec, self.tool, min(max_new_tokens, room), self.max_tool_calls, live)

    # The decorator enters inference mode only while the generator itself runs, not while its consumer does.
    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], turns: list[Turn], sampler: Sampler) -> Iterator[tuple[int, Event]]:
        """The core loop: feed the prompts once, then one token per row and step; yields (row, event)."""
        decoder = self.decoder()
        logits = decoder.prefill(prompts, max(turn.max_length for turn in turns))
        rows = list(range(len(turns)))  # row of the batch -> index of its turn
        while True:
            for row, token in enumerate(sampler(logits[:, : self.vocabulary]).tolist()):
                if turns[rows[row]].finish_reason is None:
                    for event in turns[rows[row]].advance(token):
                        yield rows[row], event
            alive = [row for row, index in enumerate(rows) if turns[index].finish_reason is None]
            if not alive:
                return
            # Copying the cache costs about one step, so do it only if it halves all later steps.
            if len(alive) <= len(rows) // 2 and decoder.select(alive):
                rows = [rows[row] for row in alive]
            logits = decoder.step([turns[index].ids[-1] for index in rows])

    def decoder(self) -> Decoder:
        """A new decoder for each batch; the compiled one is kept, with its graphs."""
        pad = next(iter(self.codec.stop))
        if not self.compile:
            return Decoder(self.model, pad)
        if self.compiled is None:
            self.compiled = CompiledDecoder(self.model, pad)
        return self.compiled
