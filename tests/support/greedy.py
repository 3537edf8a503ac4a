"""Greedy decoding without a cache, for comparison."""

import torch

PROMPTS = [[5, 17, 200], list(range(40, 69)), [7] * 11, [499]]
OPTIONS = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def alone(model, prompt):
    """Greedy ids, with the full sequence recomputed for each."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + OPTIONS["max_new_tokens"]:
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]
