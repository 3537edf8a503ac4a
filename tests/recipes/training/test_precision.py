"""float8 on torchao where that is installed, emulated; elsewhere on a stand-in with torchao's names and contracts."""

import os
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import accelerate.accelerator
import accelerate.state
import accelerate.utils.dataclasses
import accelerate.utils.imports
import float8
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import AORecipeKwargs
from accelerate.utils.imports import is_torchao_available
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.errors import UserError
from recipes.training.device import (
    accelerator_options,
    computes_in_float8,
    convert_to_float8,
    evaluation_precision,
    let_segments_grow,
)

MODELS = {"plain": (NanoChatConfig, NanoChatForCausalLM), "turbo": (NanoChatTurboConfig, NanoChatTurboForCausalLM)}
LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "WORLD_SIZE")
GATHER = "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHER, GATHER):
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch, capability: tuple[int, int] | None) -> list[str]:
    """This machine, with a CUDA device or without; collects what is set as the precision of float32 products."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    return chosen


@pytest.fixture
def torchao(monkeypatch):
    try:
        if is_torchao_available():
            import torchao.float8

            return torchao.float8
    except PackageNotFoundError:  # importable, but not installed
        pass
    stand_in = float8.stand_in()
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)
    for module in (accelerate.utils.dataclasses, accelerate.utils.imports, accelerate.accelerator):
        monkeypatch.setattr(module, "is_torchao_available", lambda: True)
    monkeypatch.setattr(accelerate.state, "is_fp8_available", lambda: True)
    return stand_in


@pytest.mark.parametrize("capability, expected", [(None, "no"), ((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_the_precision_is_found(monkeypatch, capability, expected):
    chosen = machine(monkeypatch, capability)
    assert accelerator_options() == {"mixed_precision": expected}
    assert chosen == ([] if capability is None else ["high"])


def test_a_cuda_device_that_is_not_to_be_used_decides_nothing(monkeypatch):
    chosen = machine(monkeypatch, (9, 0))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert accelerator_options() == {"mixed_precision": "no"} and not chosen


@pytest.mark.parametrize("processes, device, expected", [(1, None, {}), (2, None, {"cpu": True}), (2, "cuda", {})])
def test_several_processes_without_a_gpu_share_the_cpu(monkeypatch, processes, device, expected):
    machine(monkeypatch, None)
    found = device and torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert accelerator_options() == {"mixed_precision": "no"} | expected
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert accelerator_options().get("cpu", False) is (processes > 1)  # Apple's GPU cannot be shared


@pytest.mark.parametrize("asked", ["no", "bf16"])
def test_the_launch_file_decides(monkeypatch, asked):
    for capability in (None, (9, 0)):
        machine(monkeypatch, capability)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        assert accelerator_options() == {"mixed_precision": asked}


def test_float16_is_refused(monkeypatch):
    machine(monkeypatch, (9, 0))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16: the model leaves float16's range; take bf16"):
        accelerator_options()


def test_float8_is_accelerates_recipe_with_our_layers(monkeypatch, torchao):
    machine(monkeypatch, (8, 9))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv(GATHER, "1")  # what Accelerate's launcher sets where nothing is said
    options = accelerator_options()
    (recipe,) = options["kwargs_handlers"]
    assert options["mixed_precision"] == "fp8" and recipe.module_filter_func is computes_in_float8
    assert not recipe.config.enable_fsdp_float8_all_gather


@pytest.mark.parametrize("said, expected", [(None, False), ("False", False), ("True", True)])
def test_sharded_weights_are_gathered_in_float8_only_if_the_launch_file_says_so(monkeypatch, torchao, said, expected):
    machine(monkeypatch, (9, 0))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if said is not None:
        monkeypatch.setenv(GATHER, said)
    (recipe,) = accelerator_options()["kwargs_handlers"]
    assert recipe.config.enable_fsdp_float8_all_gather is expected


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6)])
def test_float8_needs_the_hardware(monkeypatch, torchao, capability):
    machine(monkeypatch, capability)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8 needs a GPU with float8"):
        accelerator_options()


def test_float8_needs_torchao(monkeypatch):
    machine(monkeypatch, (9, 0))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setattr(accelerate.utils.dataclasses, "is_torchao_available", lambda: False)
    with pytest.raises(UserError, match="pip install torchao"):
        accelerator_options()


def on_meta(architecture: str, **sizes) -> nn.Module:
    config_class, model_class = MODELS[architecture]
    with torch.device("meta"):
        return model_class(config_class(**sizes))


def chosen_layers(model: nn.Module) -> set[str]:
    """Kinds of layer that are chosen, each in every decoder layer."""
    names = [name for name, module in model.named_modules() if computes_in_float8(module, name)]
    kinds = {name.rpartition(".")[2] for name in names}
    assert len(names) == len(kinds) * model.config.num_hidden_layers
    return kinds


@pytest.mark.parametrize("architecture", MODELS)
def test_all_large_matrices_of_the_layers_are_chosen_and_nothing_else(architecture):
    width = {"vocab_size": 32768, "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
    large = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    assert chosen_layers(on_meta(architecture, **width)) == large  # no head, no gate
    assert chosen_layers(on_meta(architecture, **width | {"num_key_value_heads": 1})) == large  # 128 wide
    grouped = on_meta(architecture, **width | {"num_attention_heads": 12, "num_key_value_heads": 1})
    assert chosen_layers(grouped) == large - {"k_proj", "v_proj"}  # 64 wide
    assert chosen_layers(on_meta(architecture, **width | {"hidden_size": 64, "num_attention_heads": 2})) == set()
    odd = on_meta(architecture, **width | {"intermediate_size": 1000})
    assert chosen_layers(odd) == large - {"fc1", "fc2"}  # 1000 = 62.5 x 16


def small_model(architecture: str) -> nn.Module:
    config_class, model_class = MODELS[architecture]
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def in_float8(model: nn.Module, torchao) -> nn.Module:
    config = torchao.Float8LinearConfig(emulate=True)
    return torchao.convert_to_float8_training(model, module_filter_fn=computes_in_float8, config=config)


IDS = torch.arange(32).reshape(2, 16)


@pytest.mark.parametrize("architecture", MODELS)
def test_evaluation_computes_as_if_there_were_no_float8(architecture, torchao, tmp_path):
    model = small_model(architecture).eval()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
        in_float8(model, torchao)
        rounded = model(IDS).logits
        assert 0.01 < (rounded - expected).abs().max() < 3
        with evaluation_precision(model):
            assert torch.equal(model(IDS).logits, expected)
            model.save_pretrained(tmp_path)
        assert torch.equal(model(IDS).logits, rounded)
        with pytest.raises(KeyError), evaluation_precision(model):
            raise KeyError
        assert torch.equal(model(IDS).logits, rounded)  # float8 again, whatever happened inside
    for saved in (model.state_dict(), load_file(tmp_path / "model.safetensors")):
        assert saved.keys() == weights.keys()
        assert all(type(saved[name]) is torch.Tensor and torch.equal(saved[name], weights[name]) for name in weights)


def test_evaluation_does_not_make_the_compiled_model_compile_again(torchao):
    model, counter = in_float8(small_model("plain"), torchao), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)

    def step():
        compiled(IDS, shift_labels=IDS, use_cache=False).loss.backward()
        return counter.frame_count

    frames = step()
    with evaluation_precision(model.eval()), torch.no_grad():
        model(IDS)
    model.train()
    assert step() == frames > 0


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("whole", [True, False], ids=["prepare", "prepare_model"])
def test_accelerate_trains_in_float8_what_an_optimizer_already_holds(torchao, fresh_accelerator, whole):
    config = torchao.Float8LinearConfig(emulate=True)
    recipe = AORecipeKwargs(config=config, module_filter_func=computes_in_float8)
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[recipe])
    model = small_model("plain")
    names = set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if whole:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        convert_to_float8(model, accelerator)
        model = accelerator.prepare_model(model, evaluation_mode=True)
    assert type(model.model.layers[0].mlp.fc1).__name__ == "Float8Linear" and type(model.lm_head) is nn.Linear
    before = model.model.layers[0].mlp.fc1.weight.detach().clone()
    accelerator.backward(model(input_ids=IDS, shift_labels=IDS, use_cache=False).loss)
    optimizer.step()
    assert not torch.equal(model.model.layers[0].mlp.fc1.weight, before)
    assert set(accelerator.get_state_dict(model)) == names


def test_without_float8_nothing_is_converted(fresh_accelerator):
    model = small_model("plain")
    convert_to_float8(model, Accelerator(cpu=True))
    assert type(model.model.layers[0].mlp.fc1) is nn.Linear


@pytest.mark.parametrize("setting", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_set_the_allocator(setting, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, "max_split_size_mb:512")
    let_segments_grow()
    expected = {setting: "max_split_size_mb:512"} if setting else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
