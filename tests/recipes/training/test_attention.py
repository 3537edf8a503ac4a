"""Which implementation of attention the stages train with."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from recipes.training import attention
from recipes.training.arguments import LoopArguments
from recipes.training.attention import choose_attention, evaluation_attention, set_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Machine(SimpleNamespace):
    """An accelerator with that device, the compute capability of its GPU and its precision."""


@pytest.fixture
def machine(monkeypatch):
    def make(device: str, capability: int = 9, mixed_precision: str = "bf16", compiler: bool = True) -> Machine:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(attention, "compiler_available", lambda device: (compiler, ""))
        return Machine(device=torch.device(device), mixed_precision=mixed_precision)

    return make


def chosen(machine: Machine, name: str | None = None, compiled: bool | None = None, before: str = "sdpa") -> str:
    model = random_model("turbo")
    model.set_attn_implementation(before)
    choose_attention(model, name, compiled, machine)
    return model.config._attn_implementation


def test_flex_attention_is_the_default_where_it_was_measured(machine):
    assert chosen(machine("cuda")) == "flex_attention"
    assert chosen(machine("cuda", mixed_precision="fp8"), name="", compiled=True) == "flex_attention"


def test_elsewhere_the_default_is_sdpa(machine):
    assert chosen(machine("cpu")) == chosen(machine("mps")) == "sdpa"
    assert chosen(machine("cuda", capability=8)) == chosen(machine("cuda", mixed_precision="no")) == "sdpa"
    assert chosen(machine("cuda"), compiled=False) == chosen(machine("cuda", compiler=False)) == "sdpa"


def test_what_is_named_or_stands_in_the_models_folder_comes_first(machine):
    assert chosen(machine("cuda"), name="sdpa") == "sdpa"
    assert chosen(machine("cuda", capability=8), name="flex_attention", compiled=False) == "flex_attention"
    assert chosen(machine("cuda"), before="eager") == "eager"


@pytest.mark.parametrize("name", ["flash_attention", "someone/flash-attn3", "flex"])
def test_names_that_nobody_knows_are_refused_before_anything_is_read(name):
    with pytest.raises(
        UserError, match=rf"^attn_implementation {name}: there are only sdpa, flex_attention, .*eager and "
    ):
        LoopArguments(attn_implementation=name)


@pytest.mark.parametrize(
    ("name", "device", "bfloat16", "message"),
    [
        ("flex_attention", CPU, True, "does not train on cpu: take sdpa"),
        ("flash_attention_3", CPU, True, "does not train on cpu: take sdpa"),
        ("flash_attention_3", CUDA, False, "computes in bfloat16 only"),
        ("kernels-community/flash-attn3", CUDA, False, "computes in bfloat16 only"),
        ("flash_attention_3", CUDA, True, "cannot be used here: "),
    ],
)
def test_what_does_not_train_here_is_told_in_one_line(monkeypatch, name, device, bfloat16, message):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(UserError, match=f"^attn_implementation {name} {message}") as told:
        set_attention(random_model("turbo"), name, device, bfloat16)
    assert "\n" not in str(told.value)


def test_evaluations_take_sdpa_in_place_of_flex_attention_only():
    model = random_model("turbo")
    for name in ("flex_attention", "eager"):
        model.set_attn_implementation(name)
        with evaluation_attention(model):
            assert model.config._attn_implementation == ("sdpa" if name == "flex_attention" else name)
        assert model.config._attn_implementation == name


def test_a_saved_model_does_not_ask_for_what_it_was_trained_with(tmp_path):
    model = random_model("plain")
    model.set_attn_implementation("flex_attention")
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()
    assert NanoChatForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
