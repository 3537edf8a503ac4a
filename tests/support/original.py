"""Small checkpoints in both layouts of the original."""

import json
import pickle
from pathlib import Path

import tiktoken
import torch

from modeling_nanochat.tokenization_nanochat import SPECIAL_TOKENS, SPLIT_PATTERN, byte_symbols

VOCAB, PADDED = 300, 320
EXTRAS = ["resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"]


def encoding_of(tokenizer) -> dict:
    """What tiktoken needs to know of a nanochat tokenizer."""
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocab = {token: rank for token, rank in tokenizer.get_vocab().items() if token not in SPECIAL_TOKENS}
    ranks = {bytes(byte_of[symbol] for symbol in token): rank for token, rank in vocab.items()}
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {"pat_str": SPLIT_PATTERN, "mergeable_ranks": ranks, "special_tokens": special}


def pickle_tokenizer(tokenizer, folder: Path) -> tiktoken.Encoding:
    """Leave `tokenizer.pkl` as the original does."""
    encoder = tiktoken.Encoding("rustbpe", **encoding_of(tokenizer))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoder))
    return encoder


def write_checkpoint(folder: Path, weights: dict, model_config: dict, step: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": model_config}))
    return folder


def toy_weights(rows: int = VOCAB, turbo: bool = False) -> dict[str, torch.Tensor]:
    """Random weights with the original's names: 2 layers, 32 wide, 2 heads, 1 of them for keys and values."""
    shapes = {"transformer.wte.weight": (rows, 32), "lm_head.weight": (rows, 32)}
    for i in range(2):
        attention = {"c_q": (32, 32), "c_k": (16, 32), "c_v": (16, 32), "c_proj": (32, 32)}
        shapes |= {f"transformer.h.{i}.attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (128, 32), f"transformer.h.{i}.mlp.c_proj.weight": (32, 128)}
    if turbo:
        shapes |= dict(zip(EXTRAS, [(2,), (2,), (1, 24), (1,), (1,)], strict=True))
        shapes |= {"value_embeds.1.weight": (rows, 16), "transformer.h.1.attn.ve_gate.weight": (1, 12)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def toy_config(**changes) -> dict:
    sizes = {"sequence_len": 256, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    return sizes | changes


def toy_checkpoint(folder: Path, tokenizer, architecture: str = "plain") -> Path:
    """What is published of a model: launch layout if plain, current layout if turbo, and the pickled tokenizer."""
    if architecture == "plain":
        write_checkpoint(folder, toy_weights(), toy_config())
    else:
        write_checkpoint(folder, toy_weights(PADDED, turbo=True), toy_config(window_pattern="SL"))
    torch.save(torch.ones(VOCAB, dtype=torch.int32), folder / "token_bytes.pt")
    pickle_tokenizer(tokenizer, folder)
    return folder
