"""The step for CPUs: the forward pass's logits, and only where it may stand in for one."""

import pytest
import torch
from conftest import random_model
from greedy import alone

from modeling_nanochat.chat.cpu_step import ANGLES, step_of
from modeling_nanochat.chat.decoding import Decoder

PROMPTS = [[5, 17, 200], list(range(40, 54)), [7] * 9]


def logits_of(decoder, prompts, steps):
    logits = [decoder.prefill(prompts, steps)]
    for i in range(steps):
        logits.append(decoder.step([(31 * i + 7 * row) % 250 for row in range(len(prompts))]))
    return torch.stack(logits, dim=1)


def by_forward(model, prompts, steps):
    decoder = Decoder(model)
    decoder.cpu_step = None
    return logits_of(decoder, prompts, steps)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_logits_are_those_of_the_forward_pass(architecture, heads, rows):
    """With grouped queries, padding and, in turbo, windows shorter than the text."""
    model = random_model(architecture, num_key_value_heads=heads)
    assert step_of(model) is not None
    prompts = (PROMPTS * rows)[:rows]
    expected = by_forward(model, prompts, 40)
    assert torch.allclose(logits_of(Decoder(model), prompts, 40), expected, atol=2e-5)
    assert expected.std() > 0.1


@torch.inference_mode()
def test_positions_beyond_the_angles_computed_at_first():
    model = random_model("turbo", max_position_embeddings=2 * ANGLES)
    prompt = [[i % 200 for i in range(ANGLES - 3)]]
    assert torch.allclose(logits_of(Decoder(model), prompt, 8), by_forward(model, prompt, 8), atol=2e-5)


@torch.inference_mode()
def test_a_heavy_row_and_a_row_of_zeros_stay_finite():
    model = random_model("plain")
    model.model.embed_tokens.weight[3] = 0
    model.model.embed_tokens.weight[4] *= 1e6
    decoder = Decoder(model)
    decoder.prefill([[3, 3], [4, 4]], 2)
    assert decoder.step([3, 4]).isfinite().all()


def hooked(model):
    model.model.layers[1].mlp.fc1.register_forward_hook(lambda *_: None)


def observed(model):
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)


def eager(model):
    model.set_attn_implementation("eager")


def smaller_dtype(model):
    model.to(torch.bfloat16)


def with_another_layer(model):
    class Adapter(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Adapter(64, 64, bias=False)


def with_another_activation(model):
    model.config.hidden_act = "gelu"


def with_angles_that_depend_on_the_length(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
@pytest.mark.parametrize(
    "change",
    [
        hooked,
        observed,
        eager,
        smaller_dtype,
        with_another_layer,
        with_another_activation,
        with_angles_that_depend_on_the_length,
    ],
)
def test_a_model_with_anything_replaced_keeps_its_forward_pass(architecture, change):
    model = random_model(architecture)
    change(model)
    assert step_of(model) is None


def test_nor_is_it_used_under_autocast_or_for_subclasses():
    model = random_model("plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert step_of(model) is None
    model.__class__ = type("Other", (type(model),), {})
    assert step_of(model) is None


@torch.inference_mode()
def test_weights_changed_between_two_replies_count(either_model):
    first = alone(either_model, PROMPTS[1])
    with torch.no_grad():
        saved = either_model.model.layers[0].self_attn.v_proj.weight.clone()
        either_model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    changed = logits_of(Decoder(either_model), PROMPTS, 5)
    assert torch.allclose(changed, by_forward(either_model, PROMPTS, 5), atol=2e-5)
    either_model.model.layers[0].self_attn.v_proj.weight.copy_(saved)
    assert alone(either_model, PROMPTS[1]) == first
