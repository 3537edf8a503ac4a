"""Greedy continuations of a few fixed prompts by a base model: a quick check of what it has learned so far."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.tokenization_nanochat import encode_documents

# The original's prompts, so that logs can be compared side by side.
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def samples(
    model: NanoChatForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 16,
) -> list[str]:
    """Return each prompt followed by its greedy continuation, up to bos or the end of a turn.

    Unlike the engine, this needs no chat template and calls no tool.

    Args:
        model: A causal language model, not compiled; its train or eval mode is restored.
        tokenizer: Its tokenizer, with a bos token.
        max_new_tokens: Maximum number of tokens of a continuation.
    """
    encoded = encode_documents(tokenizer, prompts)
    bos, stop = tokenizer.bos_token_id, [tokenizer.bos_token_id, tokenizer.eos_token_id]
    rows = [torch.tensor(ids, device=model.device) for ids in encoded]
    ids = pad_sequence(rows, batch_first=True, padding_value=bos, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": stop, "pad_token_id": bos}
    if beyond := list(range(len(tokenizer), model.config.vocab_size)):  # rows of padding in the embedding table
        options["suppress_tokens"] = beyond
    was_training = model.training
    model.eval()
    try:
        generated = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    finally:
        model.train(was_training)
    continuations = [list(takewhile(lambda token: token not in stop, row)) for row in generated]
    return [str(tokenizer.decode(ids[1:] + more)) for ids, more in zip(encoded, continuations, strict=True)]
