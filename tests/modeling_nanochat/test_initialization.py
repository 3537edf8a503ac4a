"""Every group of weights begins as the original's does, however the model comes to be."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM

WIDTH, VOCABULARY, LAYERS = 256, 1000, 4
NORMAL, UNIFORM = 3.0, 1.8  # kurtosis of the two distributions
GROUPS = {
    "plain": {  # name part -> (std, kurtosis); the MLP is four times as wide as the model
        "embed_tokens": (1.0, NORMAL),
        "lm_head": (0.0, None),
        "o_proj": (0.0, None),
        "fc2": (0.0, None),
        "": (WIDTH**-0.5, NORMAL),
    },
    "turbo": {
        "embed_tokens": (0.8, NORMAL),
        "lm_head": (0.001, NORMAL),
        "o_proj": (0.0, None),
        "fc2": (0.0, None),
        "fc1": (0.4 * WIDTH**-0.5, UNIFORM),
        "": (WIDTH**-0.5, UNIFORM),
    },
}
CLASSES = {
    "plain": (NanoChatConfig, NanoChatForCausalLM),
    "turbo": (NanoChatTurboConfig, NanoChatTurboForCausalLM),
}


def built(architecture, how, tmp_path):
    config_class, model_class = CLASSES[architecture]
    config = config_class.from_depth(LAYERS, vocab_size=VOCABULARY)
    if how == "constructor":
        return model_class(config)
    if how == "from_config":
        return AutoModelForCausalLM.from_config(config)
    if how == "meta":
        with torch.device("meta"):
            model = model_class(config)
        model.to_empty(device="cpu")
        model.init_weights()
        return model
    model = model_class(config)
    kept = {name: weight for name, weight in model.state_dict().items() if name == "model.layers.0.mlp.fc1.weight"}
    model.save_pretrained(tmp_path / "folder", state_dict=kept)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("how", ["constructor", "from_config", "meta", "missing keys"])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_each_group_has_the_originals_distribution(architecture, how, tmp_path):
    torch.manual_seed(0)
    model = built(architecture, how, tmp_path)
    for name, p in model.named_parameters():
        if "gate" in name or "lambda" in name:
            continue
        std, kurtosis = next(value for part, value in GROUPS[architecture].items() if part in name)
        assert p.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(p.mean().item()) <= 5 * std / math.sqrt(p.numel()), name
        if kurtosis is not None:
            assert (p / p.std()).pow(4).mean().item() == pytest.approx(kurtosis, rel=0.1), name
        if kurtosis == UNIFORM:
            assert p.abs().max() <= std * 3**0.5 * 1.0001, name


@pytest.mark.parametrize("how", ["constructor", "from_config", "meta", "missing keys"])
def test_gates_and_scales_of_turbo(how, tmp_path):
    torch.manual_seed(0)
    model = built("turbo", how, tmp_path).model
    gates = [model.smear_gate.weight] + [model.layers[i].self_attn.ve_gate.weight for i in (1, 3)]
    gates = torch.cat([gate.flatten() for gate in gates])
    assert gates.min() >= 0 and gates.max() <= 0.02 and 0.006 < gates.mean() < 0.014
    assert model.resid_lambdas.tolist() == pytest.approx([1.15 - 0.10 * i / 3 for i in range(4)])
    assert model.x0_lambdas.tolist() == pytest.approx([0.20 - 0.15 * i / 3 for i in range(4)])
    assert model.smear_lambda.item() == 0 and model.backout_lambda.item() == pytest.approx(0.2)


@pytest.mark.parametrize("how", ["constructor", "from_config", "meta", "missing keys"])
@pytest.mark.parametrize(("architecture", "base"), [("plain", 10_000.0), ("turbo", 100_000.0)])
def test_buffers_are_there_however_the_model_was_built(architecture, base, how, tmp_path):
    frequencies = built(architecture, how, tmp_path).model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, base ** (-torch.arange(0, 128, 2) / 128))


def test_the_first_loss_is_ln_v():
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 16))
    for architecture, tolerance in (("plain", 1e-6), ("turbo", 1e-3)):
        config_class, model_class = CLASSES[architecture]
        model = model_class(config_class.from_depth(2, vocab_size=VOCABULARY))
        assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(VOCABULARY), rel=tolerance)
