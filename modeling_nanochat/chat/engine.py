"""Generation with a KV cache and the python tool: one streamed turn, or many conversations at once.

Both run the same loop. Every row of the batch has a [`Turn`], which watches the row's tokens: between
`<|python_start|>` and `<|python_end|>` it collects code, runs it, and forces `<|output_start|>`result`<|output_end|>`
into the row in place of sampled tokens. A row ends with `<|assistant_end|>`, `<|bos|>` or one of its stop strings.

Unlike in the original's engine, prompts of a batch may differ (left padding), code that fails has its error as result,
and finished rows leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .decoding import CompiledDecoder, Decoder
from .python_tool import check_sandbox, run_python
from .sampling import Sampler, SamplingOptions, check_setting
from .self_check import check_cached_decoding, warn_of_untested_versions
from .turn import MAX_TOOL_CALLS, Event, Finished, Turn, chat_codec


class Engine:
    """A chat model with its python tool.

    Args:
        model: A causal language model; put into evaluation mode.
        tokenizer: Its tokenizer, with nanochat's control tokens and a chat template.
        tool: Runs code and returns its output; None: nothing is run, and code is treated as text.
        max_tool_calls: Maximum calls in a turn; one more ends it.
        compile: Compile the decoding step: slower to the first token, faster afterwards. One turn or batch at a time.

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
    ):
        if tool is run_python:
            check_sandbox()
        self.model = model.eval()
        self.codec = chat_codec(tokenizer)
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
        prompt = self.codec.prompt(messages)
        turn = self.turn(prompt, max_new_tokens, options, live=True)
        for _, event in self.decode([prompt], [turn], sampler):
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
        sampler = self.sampler(seed)
        each = options if isinstance(options, Sequence) else [options] * len(prompts)
        turns = [self.turn(prompt, max_new_tokens, own) for prompt, own in zip(prompts, each, strict=True)]
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
        return Turn(
            self.codec, self.tool, length, self.max_tool_calls, options or self.options, live, seen=set(prompt)
        )

    # The decorator enters inference mode only while the generator itself runs, not while its consumer does.
    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], turns: list[Turn], sampler: Sampler) -> Iterator[tuple[int, Event]]:
        """The core loop: feed the prompts once, then one token per row and step; yields (row, event)."""
        decoder = self.decoder()
        logits = decoder.prefill(prompts, max(turn.max_length for turn in turns))
        rows = list(range(len(turns)))  # row of the batch -> index of its turn
        while True:
            options, seen = [turns[index].options for index in rows], [turns[index].seen for index in rows]
            for row, token in enumerate(sampler(logits[:, : self.vocabulary], options, seen).tolist()):
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


def folder_options(model: PreTrainedModel) -> SamplingOptions:
    try:
        return SamplingOptions.from_generation_config(model.generation_config)
    except UserError as error:
        raise UserError(f"{model.name_or_path or 'this model'}: generation_config.json: {error}") from error
