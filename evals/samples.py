"""Greedy continuations of a few fixed prompts by a base model: a quick check of what it has learned so far."""

from collections.abc import Sequence

import torch

from modeling_nanochat.chat.decoding import Decoder
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


def samples(model, tokenizer, prompts: Sequence[str] = PROMPTS, max_new_tokens: int = 16) -> list[str]:
    """Return each prompt followed by its greedy continuation, up to bos or the end of a turn.

    Unlike the engine, this needs no chat template and calls no tool.

    Args:
        model: A causal language model, not compiled; its train or eval mode is restored.
        tokenizer: Its tokenizer, with a bos token.
        max_new_tokens: Maximum number of tokens of a continuation.
    """
    encoded = encode_documents(tokenizer, prompts)
    was_training = model.training
    model.eval()
    try:
        continuations = continue_greedily(model, tokenizer, encoded, max_new_tokens)
    finally:
        model.train(was_training)
    return [tokenizer.decode(ids[1:] + more) for ids, more in zip(encoded, continuations, strict=True)]


@torch.no_grad()
def continue_greedily(model, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the new ids of each row, without the first stop token and what follows it."""
    stop = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    vocabulary = min(len(tokenizer), model.config.vocab_size)
    decoder = Decoder(model, tokenizer.bos_token_id)
    logits = decoder.prefill(prompts, max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(rows)
    for step in range(max_new_tokens):
        tokens = logits[:, :vocabulary].argmax(-1).tolist()
        finished = [done or token in stop for done, token in zip(finished, tokens, strict=True)]
        for row, token, done in zip(rows, tokens, finished, strict=True):
            if not done:
                row.append(token)
        if all(finished) or step == max_new_tokens - 1:
            break
        logits = decoder.step(tokens)
    return rows
