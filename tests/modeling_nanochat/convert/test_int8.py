"""Weights in int8: how far the logits move, what stays, and that the chat engine decodes with them."""

import copy

import pytest
import torch
from torch import nn

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.chat.__main__ import start
from modeling_nanochat.chat.decoding import Decoder
from modeling_nanochat.chat.self_check import check_cached_decoding
from modeling_nanochat.convert.int8 import FEW_ROWS, Int8Linear, quantize_int8
from modeling_nanochat.errors import UserError

SIZES = {"vocab_size": 300, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"num_key_value_heads": 3, "max_position_embeddings": 128}


@pytest.fixture(params=["plain", "turbo"])
def model(request):
    torch.manual_seed(0)
    if request.param == "plain":
        model = NanoChatForCausalLM(NanoChatConfig(**SIZES))
    else:
        model = NanoChatTurboForCausalLM(NanoChatTurboConfig(**SIZES, window_pattern="SL"))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    return model.eval().bfloat16()


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 100])
@pytest.mark.parametrize("shape", [(300, 96), (33, 40), (128, 32)])
def test_a_product_is_that_of_the_rounded_weights(rows, shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    quantized, x = Int8Linear(layer), torch.randn(1, rows, shape[1], dtype=torch.bfloat16)
    rounded = quantized.weight.float() * quantized.scale.float()[:, None]
    assert ((layer.weight.float() - rounded).abs() <= quantized.scale.float()[:, None]).all()
    with torch.no_grad():
        torch.testing.assert_close(quantized(x).float(), x.float() @ rounded.T, rtol=8e-3, atol=2e-3)


def test_a_row_of_zeros_stays_zero():
    layer = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(layer.weight)
    assert not Int8Linear(layer)(torch.randn(4, 32, dtype=torch.bfloat16)).any()


def test_the_logits_move_little_and_the_head_is_quantized_too(model):
    ids = torch.randint(0, 300, (2, 50))
    with torch.no_grad():
        expected = model(ids).logits.float()
        embeddings = model.get_input_embeddings().weight.clone()
        parameters = model.num_parameters()
        quantize_int8(model)
        logits = model(ids).logits.float()
    assert isinstance(model.lm_head, Int8Linear) and torch.equal(model.get_input_embeddings().weight, embeddings)
    deviation = (logits - expected).square().mean().sqrt() / expected.std()
    assert 0 < deviation < 0.04  # rounding to 8 bits moves each product of random numbers by 1 %
    quantized = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(quantized) == 2 * 6 + 1
    assert {module.weight.dtype for module in quantized} == {torch.int8}
    assert model.num_parameters() == parameters


def test_decoding_computes_what_one_pass_does(model):
    quantize_int8(model)
    check_cached_decoding(model)
    ids = torch.randint(0, 300, (1, 40))
    decoder = Decoder(model)
    with torch.inference_mode():
        expected = model(ids).logits[0]
        logits = [decoder.prefill([ids[0, :30].tolist()], 20)]
        logits += [decoder.step([token]) for token in ids[0, 30:].tolist()]
    deviation = (torch.cat(logits).float() - expected[29:].float()).square().mean().sqrt()
    assert deviation < 0.02 * expected.float().std()  # rounding to bfloat16


def test_the_flag_quantizes_before_the_first_reply(toy_model_folder, capsys, monkeypatch):
    counts = []
    monkeypatch.setattr("modeling_nanochat.chat.__main__.quantize_int8", lambda model: counts.append(copy.copy(model)))
    start([str(toy_model_folder), "-p", "hi", "--max_new_tokens", "2", "--quantize", "int8"])
    start([str(toy_model_folder), "-p", "hi", "--max_new_tokens", "2"])
    assert [(model.device.type, model.dtype) for model in counts] == [("cpu", torch.bfloat16)]
    with pytest.raises(UserError, match="argument --quantize: invalid choice: 'int4'"):
        start([str(toy_model_folder), "--quantize", "int4"])
