import pytest
import torch
from golden import golden_json
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.sizes import (
    decode_bytes_per_step,
    decode_flops_per_token,
    kv_bytes_per_token,
    kv_bytes_read_per_step,
    matmul_parameters,
    parameter_counts,
    prefill_flops,
    scaling_parameters,
    training_flops_per_token,
    window_sizes,
)

MODELS = {NanoChatConfig: NanoChatForCausalLM, NanoChatTurboConfig: NanoChatTurboForCausalLM}
TOY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_turbo_sizes_of_every_depth_are_the_originals():
    rows = golden_json("scaling.json")["current"]
    assert {row["depth"] for row in rows} >= {4, 12, 13, 20, 24, 34}
    for row in rows:
        config = NanoChatTurboConfig.from_depth(row["depth"])
        assert (config.hidden_size, config.num_attention_heads) == (row["n_embd"], row["n_head"])
        assert config.num_key_value_heads == row["n_head"] and config.num_hidden_layers == row["depth"]
        assert parameter_counts(config) == row["param_counts"]
        assert scaling_parameters(config) == row["scaling_params"]
        assert matmul_parameters(config) == row["matmul_params"]
        assert training_flops_per_token(config) == row["flops_per_token"]
        assert set(window_sizes(config)) == {row["short_window"], config.max_position_embeddings}


def test_plain_sizes_of_every_depth_are_the_originals():
    rows = golden_json("scaling.json")["launch"]
    assert {row["depth"] for row in rows} >= {4, 12, 20, 32, 34}
    for row in rows:
        config = NanoChatConfig.from_depth(row["depth"])
        assert (config.hidden_size, config.num_attention_heads) == (row["n_embd"], row["n_head"])
        assert config.hidden_size // config.num_attention_heads == row["head_dim"]
        assert parameter_counts(config)["total"] == row["num_params"]
        assert training_flops_per_token(config) == row["flops_per_token"]


def test_plain_toy_sizes_are_the_originals():
    values = golden_json("classic_forward.json")
    config = NanoChatConfig(vocab_size=500, num_hidden_layers=4, max_position_embeddings=128, **TOY)
    assert parameter_counts(config)["total"] == values["num_params"]
    assert training_flops_per_token(config) == values["flops_per_token"]


def test_turbo_toy_sizes_are_the_originals():
    values = golden_json("current_forward.json")
    config = NanoChatTurboConfig(
        vocab_size=values["padded_vocab_size"], num_hidden_layers=6, max_position_embeddings=256, **TOY
    )
    assert parameter_counts(config) == values["param_counts"]
    assert matmul_parameters(config) == values["num_matmul_params"]
    assert training_flops_per_token(config) == values["flops_per_token"]
    assert decode_flops_per_token(config, 100) == values["decode_flops_ctx_100"]
    assert prefill_flops(config, 100) == values["prefill_flops_100"]
    assert kv_bytes_per_token(config, 4) == values["kv_bytes_per_token_fp32"]
    assert kv_bytes_read_per_step(config, 200, 4) == values["kv_read_bytes_fp32_ctx_200"]
    assert window_sizes(config) == [left for left, _ in values["window_sizes"]]
    assert config.value_embedding_layers == values["value_embed_layers"]


def group(name: str, parameter: torch.nn.Parameter) -> str:
    if "embed_tokens" in name:
        return "wte"
    if "lm_head" in name or "value_embeds" in name:
        return "lm_head" if "lm_head" in name else "value_embeds"
    return "transformer_matrices" if ".layers." in name and parameter.ndim == 2 else "scalars"


def counted(model) -> dict[str, int]:
    counts = dict.fromkeys(("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars"), 0)
    for name, parameter in model.named_parameters():
        counts[group(name, parameter)] += parameter.numel()
    return counts | {"total": sum(counts.values())}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("depth", [1, 2, 5, 13, 50])
def test_counts_are_those_of_a_built_model(kind, depth):
    config = kind.from_depth(depth)
    with torch.device("meta"):
        model = MODELS[kind](config)
    assert parameter_counts(config) == counted(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 1, "attention_bias": True},
        {"tie_word_embeddings": True, "intermediate_size": 100},
        {"head_dim": 32},
    ],
    ids="-".join,
)
def test_unusual_fields_are_counted_too(kind, fields):
    config = kind(**{"vocab_size": 300, "num_hidden_layers": 3} | TOY | fields)
    model = MODELS[kind](config)
    assert parameter_counts(config) == counted(model)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert matmul_parameters(config) == sum(linear.weight.numel() for linear in linears)


@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_those_that_torch_counts(kind):
    config = kind(vocab_size=300, num_hidden_layers=3, max_position_embeddings=48, **TOY)
    model = MODELS[kind](config)
    model.set_attn_implementation("eager")  # as the formula: all scores of a row, also those that the mask removes
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.arange(48)[None], use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == 48 * training_flops_per_token(config)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_a_prefill_costs_what_its_tokens_cost_one_by_one(kind, length):
    config = kind(vocab_size=300, num_hidden_layers=3, max_position_embeddings=512, **TOY)
    steps = sum(decode_flops_per_token(config, context) for context in range(1, length + 1))
    assert prefill_flops(config, length) == steps


def test_short_rows_need_fewer_flops_and_long_rows_only_where_attention_is_full():
    turbo, plain = (kind.from_depth(4, max_position_embeddings=2048) for kind in (NanoChatTurboConfig, NanoChatConfig))
    at = {length: training_flops_per_token(turbo, length) for length in (256, 512, 1024)}
    assert at[512] - at[256] == 12 * 256 * 4 * 256  # every layer
    assert at[1024] - at[512] == 12 * 256 * 1 * 512  # the long one only
    growth = training_flops_per_token(plain, 1024) - training_flops_per_token(plain, 512)
    assert growth == 12 * 256 * 4 * 512


def test_bytes_are_those_of_a_real_cache_and_real_weights():
    config = NanoChatConfig(vocab_size=300, num_hidden_layers=3, max_position_embeddings=64, **TOY)
    model = NanoChatForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.arange(10)[None], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * kv_bytes_per_token(config, 4) == kv_bytes_read_per_step(config, 10, 4)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert decode_bytes_per_step(config, 10, 3, 4) == weights + 3 * held
