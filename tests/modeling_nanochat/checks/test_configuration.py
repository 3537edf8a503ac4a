import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import check_folder, load_model_and_tokenizer


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    """The one line about a folder, before anything is built of it."""
    with pytest.raises(UserError) as error:
        check_folder(folder, "me/toy")
    assert "\n" not in str(error.value) and str(error.value).startswith("me/toy: ")
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 10**12, "model_type": "nanochat_turbo"},
        {"num_hidden_layers": 10**12, "model_type": "llama"},
        {"n_layer": 10**9, "model_type": "gpt2"},
        {"num_local_experts": 10**9, "model_type": "mixtral"},
        {"num_labels": 10**9},
        {"hidden_size": 10**9},
        {"hidden_size": 10**9, "model_type": "llama"},
        {"vocab_size": 10**9},
        {"vocab_size": 10**18},
        {"intermediate_size": 10**9},
        {"num_attention_heads": 10**9, "num_key_value_heads": 1, "head_dim": 2},
        {"head_dim": 10**9},
    ],
    ids=str,
)
def test_a_model_far_larger_than_its_weights_is_not_built(toy_model_folder, change):
    change_config(toy_model_folder, **change)
    assert "weights" in refusal(toy_model_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -2},
        {"num_key_value_heads": 0},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": -5},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": math.nan},
        {"final_logit_softcapping": 0.0},
        {"final_logit_softcapping": math.inf},
        {"attention_dropout": 5.0},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": [2]},
        {"hidden_size": 32.5},
        {"rope_parameters": "default"},
        {"layer_types": ["full_attention"] * 5},
        {"quantization_config": {"quant_method": "fp8"}},
        {"experts_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
    ],
    ids=str,
)
def test_a_value_no_model_has_is_named(toy_model_folder, change):
    change_config(toy_model_folder, **change)
    assert "config.json" in refusal(toy_model_folder)


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_numbers_that_are_not_finite_are_refused(toy_model_folder, number):
    path = toy_model_folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"some_scale": ' + number + ",", 1))
    assert "not a" in refusal(toy_model_folder)


def test_a_key_that_occurs_twice_is_refused(toy_model_folder):
    path = toy_model_folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"num_hidden_layers": 5,', 1))
    assert "a key occurs twice" in refusal(toy_model_folder)


@pytest.mark.parametrize("tied", [False, True])
def test_another_architecture_is_opened(toy_model_and_tokenizer, tmp_path, tied):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=tied, bos_token_id=None, **sizes))
    for part in (model, toy_model_and_tokenizer[1]):
        part.save_pretrained(tmp_path)
    change_config(tmp_path, eos_token_id=None)
    assert isinstance(load_model_and_tokenizer(tmp_path, device="cpu")[0], LlamaForCausalLM)


def test_the_longest_context_takes_no_memory(toy_model_folder):
    change_config(toy_model_folder, max_position_embeddings=10**12)
    assert load_model_and_tokenizer(toy_model_folder, device="cpu")[0].config.max_position_embeddings == 10**12


def write_header(folder, header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":' + b"[" * 2**24, "its header has 16,777,221 bytes"),
        (b"[" * 1000, "cannot be opened"),
        ({"a": tensor([2], [0, 8])}, "cannot be opened"),  # of which no byte is there
        ({"a": tensor([10**9, 10**9, 10**9], [0, 8])}, "cannot be opened"),
        ({"a": tensor([-1], [0, 0])}, "cannot be opened"),
        ({"a": tensor([0], [0, 0], "F99")}, "cannot be opened"),
        ({"a": tensor([0], [0, 0], "I64")}, "a is I64, not floating-point"),
        ({"a": tensor([0], [0, 0], "BOOL")}, "a is BOOL, not floating-point"),
        (b"{" + b",".join(b'"%d":' % i + EMPTY for i in range(100_001)) + b"}", "100,001 tensors"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_or_strange_header_is_one_line(toy_model_folder, header, message):
    write_header(toy_model_folder, header)
    assert message in refusal(toy_model_folder)


def test_overlapping_tensors_are_refused(toy_model_folder):
    path = toy_model_folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    write_header(toy_model_folder, header)
    path.write_bytes(path.read_bytes() + data[8 + length :])
    assert "cannot be opened" in refusal(toy_model_folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_weights_in_any_kind_of_floating_point_are_opened(toy_model_folder, dtype):
    path = toy_model_folder / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    assert load_model_and_tokenizer(toy_model_folder, device="cpu")[0].dtype == torch.float32
