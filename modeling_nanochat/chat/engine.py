"""Generation with a KV cache and the python tool: one streamed turn, or many conversations at once.

Both run the same loop. Every row of the batch has a [`Turn`], which watches the row's tokens: between
`<|python_start|>` and `<|python_end|>` it collects code, runs it, and forces `<|output_start|>`result`<|output_end|>`
into the row in place of sampled tokens. A row ends with `<|assistant_end|>`, `<|bos|>` or one of its stop strings.

Unlike in the original's engine, prompts of a batch may differ (left padding), code that fails has its error as result,
and finished rows leave the batch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks.versions import warn_of_untested_versions
from ..errors import UserError
from .decoding import CompiledDecoder, Decoder
from .python_tool import check_sandbox, run_python
from .sampling import Sampler, SamplingOptions, check_setting
from .self_check import check_cached_decoding
from .turn import MAX_TOOL_CALLS, ChatCodec, Event, Finished, Turn, chat_codec

Arrivals = Callable[[int], list[Turn]]


class Engine:
    """A chat model with its python tool.

    Args:
        model: A causal language model; put into evaluation mode.
        tokenizer: Its tokenizer, with nanochat's control tokens and a chat template.
        tool: Runs code and returns its output; None: nothing is run, and code is treated as text.
        max_tool_calls: Maximum calls in a turn; one more ends it.
        compile: Compile the decoding step: slower to the first token, faster afterwards. One turn or batch at a time.
        codec: Converts text to ids and back; None: the one of nanochat's control tokens.

    `options` are those of the model folder's `generation_config.json`, for replies without options of their own.

    Raises:
        UserError: The tokenizer is not a chat tokenizer, the python tool's sandbox is missing, the folder's sampling
            options are out of their range, or the model computes other logits with its cache than without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tool: Callable[[str], str] | None = run_python,
        max_tool_calls: int = MAX_TOOL_CALLS,
        compile: bool = False,
        codec: ChatCodec | None = None,
    ):
        if tool is run_python:
            check_sandbox()
        self.model = model.eval()
        self.codec = codec or chat_codec(tokenizer)
        self.options = folder_options(model)
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
        options: SamplingOptions | None = None,
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
    ) -> Iterator[Event]:
        """Generate the assistant's next turn; the last event is [`Finished`].

        Args:
            messages: The conversation, ending with the user's message.
            options: None: `self.options`.
            max_new_tokens: Maximum tokens of the turn, tool results included; at least 1.
            seed: Same seed, same reply; None: random.

        Raises:
            UserError: The conversation does not fit the model's context, or a setting is out of its range.
        """
        sampler = self.sampler(seed)
        turn = self.turn(self.codec.prompt(messages), max_new_tokens, options, live=True)
        for _, event in self.decode([turn], sampler):
            yield event

    def generate_batch(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        options: SamplingOptions | Sequence[SamplingOptions] | None = None,
        *,
        max_new_tokens: int = 256,
        seed: int | None = None,
        batch_size: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The new messages of each conversation, as in [`Finished`]; other arguments and errors as in `stream`.

        Args:
            options: One for all conversations, or one per conversation.
            batch_size: Conversations decoded at a time, grouped by length.
            progress: Called with 1 for each finished conversation, like `tqdm.update`.
        """
        prompts = [self.codec.prompt(messages) for messages in conversations]
        return self.answer_prompts(prompts, options, max_new_tokens, seed, batch_size, progress)

    def answer_prompts(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions | Sequence[SamplingOptions] | None,
        max_new_tokens: int,
        seed: int | None,
        batch_size: int,
        progress: Callable[[int], Any] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """`generate_batch` for prompts rendered by `codec.prompt`."""
        each = options if isinstance(options, Sequence) else [options] * len(prompts)
        turns = [self.turn(prompt, max_new_tokens, own) for prompt, own in zip(prompts, each, strict=True)]
        self.complete(turns, self.sampler(seed), batch_size, progress)
        return [turn.messages for turn in turns]

    def complete(
        self,
        turns: Sequence[Turn],
        sampler: Sampler,
        batch_size: int,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Generate all `turns`, at most `batch_size` at a time; equal prompts one after the other share a prefill.

        Longest prompts first: prompts fed together are padded little, and memory runs out at once if at all.
        """
        waiting = deque(sorted(turns, key=lambda turn: -len(turn.prompt)))

        def arrivals(free: int) -> list[Turn]:
            # Several at a time, because each arrival copies the cache
            count = free if free >= max(1, batch_size // 4) else 0
            return [waiting.popleft() for _ in range(min(count, len(waiting)))]

        for _, event in self.run(arrivals, batch_size, sampler):
            if progress is not None and isinstance(event, Finished):
                progress(1)

    def fit(self, messages: list[dict[str, Any]], max_new_tokens: int = 256) -> list[dict[str, Any]]:
        """`messages` without the oldest turns, where needed to leave room for a reply; system messages stay.

        Raises:
            UserError: The last question alone leaves no room for a reply.
        """
        check_setting("max_new_tokens", max_new_tokens)
        system = [message for message in messages if message["role"] == "system"]
        rest = messages[len(system) :]
        room = self.context - min(max_new_tokens, self.context // 2)
        begins = [i for i, message in enumerate(rest) if i == 0 or message["role"] == "user"]
        kept = rest[begins[-1] :] if begins else []
        alone = length = len(self.codec.prompt(system + kept))
        if length >= self.context:
            question = sum(len(self.codec.encode(message["content"] or "")) for message in kept)
            fits = max(0, self.context - 1 - (length - question))
            raise UserError(f"the question itself is too long: {question} tokens, of which {fits} fit; shorten it")
        # Backwards from the question, each turn rendered with it alone: every message is rendered at most once
        for begin, end in reversed(list(pairwise(begins))):
            length += len(self.codec.prompt(system + rest[begin:end] + rest[begins[-1] :])) - alone
            if length > room:
                break
            kept = rest[begin:]
        return system + kept

    def sampler(self, seed: int | None) -> Sampler:
        check_setting("seed", seed)
        generator = torch.Generator(device=self.model.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        return Sampler(generator)

    def turn(
        self, prompt: list[int], max_new_tokens: int, options: SamplingOptions | None = None, live: bool = False
    ) -> Turn:
        check_setting("max_new_tokens", max_new_tokens)
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the model's context is {self.context}; shorten it"
            )
        length = min(max_new_tokens, room)
        return Turn(self.codec, self.tool, length, self.max_tool_calls, options or self.options, prompt, live)

    def decode(self, turns: Sequence[Turn], sampler: Sampler) -> Iterator[tuple[Turn, Event]]:
        """Generate `turns` together, starting all at once."""
        arriving = deque(turns)
        return self.run(lambda free: [arriving.popleft() for _ in range(len(arriving))], len(turns), sampler)

    # The decorator enters inference mode only while the generator itself runs, not while its consumer does.
    @torch.inference_mode()
    def run(self, arrivals: Arrivals, batch_size: int, sampler: Sampler) -> Iterator[tuple[Turn, Event]]:
        """The core loop: one token per turn and step; finished turns leave, waiting ones enter.

        Args:
            arrivals: Called before each step with the number of turns that may enter; returns some, or none yet. The
                loop ends if there is none while no turn is being generated.
            batch_size: Turns generated at a time.
            sampler: Chooses the tokens.
        """
        decoder = self.decoder()
        turns: list[Turn] = []  # one per row of the decoder
        new: list[Turn] = []  # to enter as soon as the cache has room
        while True:
            alive = [row for row, turn in enumerate(turns) if turn.is_running]
            # Copying the cache costs about one step, so do it only if it halves all later steps.
            if alive and len(alive) <= len(turns) // 2:
                decoder.select(alive)
                turns, alive = [turns[row] for row in alive], list(range(len(alive)))
            logits = decoder.step([turn.ids[-1] for turn in turns]) if alive else torch.empty(0)
            new += arrivals(batch_size - len(alive) - len(new))
            if not alive and not new:
                return
            if new:
                prompts, staying = [[*turn.prompt, *turn.ids] for turn in new], [turns[row] for row in alive]
                room = max(turn.max_length - len(turn.ids) for turn in staying + new)
                if decoder.fits(prompts, room, alive):
                    entered = decoder.admit(prompts, room, alive)
                    logits = torch.cat([logits[alive], entered]) if alive else entered
                    for turn in new:
                        for event in turn.resume():
                            yield turn, event
                    turns, new = staying + new, []
            options, seen = [turn.options for turn in turns], [turn.seen for turn in turns]
            generators = [turn.generator for turn in turns]
            tokens = sampler(logits[:, : self.vocabulary], options, seen, generators).tolist()
            for turn, token in zip(turns, tokens, strict=True):
                if turn.is_running:
                    for event in turn.advance(token):
                        yield turn, event

    def decoder(self) -> Decoder:
        """A new decoder for each batch; the compiled one is kept, with its graphs."""
        pad = next(iter(self.codec.stop))
        if not self.compile:
            return Decoder(self.model, pad)
        if self.compiled is None:
            self.compiled = CompiledDecoder(self.model, pad)
        return self.compiled


def folder_options(model: PreTrainedModel) -> SamplingOptions:
    try:
        return SamplingOptions.from_generation_config(model.generation_config)
    except UserError as error:
        raise UserError(f"{model.name_or_path or 'this model'}: generation_config.json: {error}") from error
