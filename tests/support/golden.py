"""Tokenizer and small trained models from the reference data next to the repository; tests skip if it is absent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.tokenization_nanochat import build_tokenizer, byte_symbols

SHARED = Path(__file__).parents[2].parent / "shared"
NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.ve_gate": "self_attn.ve_gate",
}
TOP_LEVEL = ("resid_lambdas", "x0_lambdas", "smear_", "backout_lambda", "value_embeds")


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"needs {SHARED / path}")
    return SHARED / path


def golden_json(name: str) -> dict:
    return json.loads(shared(f"golden/{name}").read_text(encoding="utf-8"))


def golden_tokenizer():
    """The toy tokenizer of 500 ids that produced all golden token ids."""
    data, symbols = golden_json("bpe_vocab.json"), byte_symbols()

    def spelled(hexadecimal: str) -> str:
        return "".join(symbols[byte] for byte in bytes.fromhex(hexadecimal))

    tokens = [spelled(token) for token in data["tokens_hex"]]
    merges = [(spelled(left), spelled(right)) for left, right in data["merges_hex"]]
    return build_tokenizer({token: index for index, token in enumerate(tokens)}, merges)


def core_model() -> NanoChatForCausalLM:
    """The small model that produced the golden CORE, letter and bits-per-byte values."""
    config = golden_json("core_eval.json")["config"]
    model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["n_embd"],
            num_hidden_layers=config["n_layer"],
            num_attention_heads=config["n_head"],
            num_key_value_heads=config["n_kv_head"],
            max_position_embeddings=config["sequence_len"],
        )
    )
    weights = load_file(shared("golden/core_model.safetensors"))
    model.load_state_dict({renamed(name): weight for name, weight in weights.items()})
    return model.eval()


def plain_model() -> NanoChatForCausalLM:
    """The toy model of the launch architecture."""
    return toy_model(NanoChatForCausalLM, NanoChatConfig, "classic", layers=4, context=128)


def turbo_model() -> NanoChatTurboForCausalLM:
    """The toy model of today's architecture, without its 12 rows of vocabulary padding."""
    return toy_model(NanoChatTurboForCausalLM, NanoChatTurboConfig, "current", layers=6, context=256)


def toy_model(model_class, config_class, name: str, layers: int, context: int):
    config = config_class(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    model = model_class(config)
    weights = load_file(shared(f"golden/{name}_weights.safetensors"))
    model.load_state_dict({renamed(key): cropped(weight).float() for key, weight in weights.items()})
    return model.eval()


def cropped(weight: torch.Tensor) -> torch.Tensor:
    return weight[:500] if weight.shape[0] == 512 else weight


def renamed(name: str) -> str:
    if name.startswith(TOP_LEVEL):
        return f"model.{name}"
    for original, ours in NAMES.items():
        name = name.replace(original, ours)
    return name
