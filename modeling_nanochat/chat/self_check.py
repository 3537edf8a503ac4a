"""Checks of a model and its tokenizer with the installed libraries, made before they are used.

Libraries change, and a cache that a model ignores raises no error: replies become gibberish, rewards 0. So the actual
behaviour is tested: [`check_cached_decoding`] runs before rollouts, chat and serving, [`check_renderings`] wherever
conversations become ids.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..checks.versions import installed_versions
from ..errors import UserError
from .decoding import Decoder

PROMPT_LENGTHS, STEPS = (16, 11), 4  # two rows, so that one is padded
FLOAT32_LIMIT = 1e-3  # on the largest difference between two logits
# On the root mean square over the vocabulary at any position, in standard deviations of the logits there. Rounding to
# bfloat16 gives 0.9 % at 4 layers and 1.6 % at 20, an ignored cache at least 42 %. (The largest difference of a single
# logit is unsuitable: it is 4 times as large, and grows with the vocabulary.)
REDUCED_LIMIT = 0.05

CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "12*7"}}}
CONVERSATION = [
    {"role": "user", "content": "What is 12*7?"},
    {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL]},
    {"role": "tool", "name": "python", "content": "84"},
    {"role": "assistant", "content": "It is 84."},
]


class Forced(LogitsProcessor):
    """Makes `generate` emit the next tokens of `rows`, whatever the model would choose."""

    def __init__(self, rows: list[list[int]]):
        self.remaining = [list(row) for row in rows]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor([[row.pop(0)] for row in self.remaining], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


@torch.inference_mode()
def check_cached_decoding(model: PreTrainedModel) -> None:
    """Compare teacher-forced logits of cached decoding, by `generate` and by our decoder, with those of one pass.

    Takes ten forward passes of a few tokens.

    Raises:
        UserError: They differ by more than rounding explains; the message names the installed versions.
    """
    training = model.training
    model.eval()
    try:
        rows = probe(model)
        expected = without_cache(model, rows)
        ways: dict[str, Callable] = {"generate": by_generate, "the chat engine": by_decoder}
        for name, way in ways.items():
            try:
                problem = disagreement(way(model, rows), expected, has_reduced_precision(model))
            except RuntimeError as error:  # a cache that is ignored does not fit the decoder's masks
                problem = str(error).splitlines()[0]
            if problem:
                raise UserError(
                    f"{name} computes other logits with the model's cache than without it ({problem}): its text would "
                    f"be wrong. Installed: {installed_versions()}; install the tested versions (constraints.txt)"
                )
    finally:
        model.train(training)


def probe(model: PreTrainedModel) -> list[list[int]]:
    """Rows of token ids, none of which ends a reply."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    vocabulary, longest = model.config.vocab_size, max(PROMPT_LENGTHS) + STEPS
    ids = [token for i in range(4 * longest) if (token := (7919 * i + 11) % vocabulary) not in ends]
    return [ids[longest - length : longest + STEPS] for length in PROMPT_LENGTHS]


def without_cache(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Logits (rows, STEPS, V) of the positions before the forced tokens, one row at a time."""
    passes = [model(torch.tensor([row], device=model.device), use_cache=False).logits for row in rows]
    return torch.cat([logits[:, -STEPS - 1 : -1] for logits in passes]).float()


def by_generate(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    longest = max(PROMPT_LENGTHS)
    prompts = [row[:-STEPS] for row in rows]
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    forced = [Forced([row[-STEPS:] for row in rows])]
    # As an argument, `settings` would be merged with the folder's, whose stop strings need a tokenizer.
    folder, model.generation_config = model.generation_config, settings
    try:
        generate: Any = model.generate  # which `PreTrainedModel` does not declare
        output = generate(ids, attention_mask=mask, logits_processor=forced)
    finally:
        model.generation_config = folder
    return torch.stack(output.logits, dim=1).float()


def by_decoder(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    decoder = Decoder(model)
    logits = [decoder.prefill([row[:-STEPS] for row in rows], STEPS)]
    logits += [decoder.step([row[step] for row in rows]) for step in range(-STEPS, -1)]
    return torch.stack(logits, dim=1).float()


def has_reduced_precision(model: PreTrainedModel) -> bool:
    """Whether products have less than float32's precision: a smaller dtype, autocast, or TF32."""
    device = model.device.type
    tf32 = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return model.dtype != torch.float32 or torch.is_autocast_enabled(device) or tf32


def disagreement(logits: torch.Tensor, expected: torch.Tensor, reduced: bool) -> str | None:
    """How far apart (rows, STEPS, V) logits are, if further than allowed; otherwise None."""
    if logits.shape != expected.shape:
        return f"{tuple(logits.shape)} logits instead of {tuple(expected.shape)}"
    difference = logits - expected
    if not reduced:
        largest = difference.abs().max().item()
        return None if largest <= FLOAT32_LIMIT else f"logits {largest:.2g} apart, the limit is {FLOAT32_LIMIT:g}"
    error, spread = difference.pow(2).mean(-1).sqrt(), expected.std(-1)
    if (error <= REDUCED_LIMIT * spread).all():
        return None
    share = (error / spread).max().item()
    return f"logits {100 * share:.0f} % of their standard deviation apart, the limit is {100 * REDUCED_LIMIT:.0f} %"


def check_renderings(tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the tokens that training marks as the assistant's with the assistant's generation prompts.

    Raises:
        UserError: A generation prompt differs from the tokens before those that are trained on.
    """
    render: Callable[..., Any] = tokenizer.apply_chat_template  # what it returns depends on the options
    options = {"tokenize": True, "return_dict": True}
    trained = render(CONVERSATION, return_assistant_tokens_mask=True, **options)
    ids, mask = list(trained["input_ids"]), list(trained["assistant_masks"])
    prompts = [list(render(CONVERSATION[:n], add_generation_prompt=True, **options)["input_ids"]) for n in (1, 3)]
    starts = [i for i, is_trained in enumerate(mask) if is_trained and not mask[i - 1]]
    if starts != [len(prompt) for prompt in prompts] or any(ids[: len(prompt)] != prompt for prompt in prompts):
        raise UserError(
            f"{tokenizer.name_or_path or 'this tokenizer'}: its chat template marks other tokens for training than "
            f"the assistant writes after a generation prompt. Installed: {installed_versions()}; install the tested "
            "versions (constraints.txt), or use the chat template of this project's tokenizers"
        )
