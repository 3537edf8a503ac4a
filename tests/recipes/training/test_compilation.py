import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from conftest import random_model

from modeling_nanochat.errors import UserError
from recipes.training import device
from recipes.training.device import compiler_available, maybe_compile

ROOT = Path(__file__).parents[3]
IDS = torch.arange(32).reshape(2, 16)
WITHOUT_COMPILER = """
import torch
from accelerate import Accelerator
from modeling_nanochat.errors import UserError
from recipes.training.device import maybe_compile
accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
assert maybe_compile(model, False, accelerator) is model
assert maybe_compile(model, None, accelerator) is model
model(torch.ones(2)).sum().backward()
try:
    maybe_compile(model, True, accelerator)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_without_a_compiler_the_run_is_the_same_and_one_line_says_so(tmp_path):
    changed = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, check=False, env=os.environ | changed, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, refused = done.stdout.splitlines()
    assert said.startswith("training runs uncompiled: ") and "No working C++ compiler" in said
    assert refused.startswith("refused: torch_compile: no compiler works here (") and "install g++" in refused


class Machine(SimpleNamespace):
    """An accelerator on the CPU that collects what is printed."""

    def __init__(self, backend=DynamoBackend.NO):
        super().__init__(device=torch.device("cpu"), state=SimpleNamespace(), printed=[])
        self.state.dynamo_plugin = SimpleNamespace(backend=backend)

    def print(self, line):
        self.printed.append(line)


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that works; collects the devices it was tried on."""
    tried = []
    monkeypatch.setattr(device, "compiler_available", lambda device: tried.append(device) or (True, ""))
    return tried


@pytest.mark.parametrize("wanted", [True, None])
def test_with_a_compiler_the_weights_are_shared_and_shapes_static(compiler, monkeypatch, wanted):
    options, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: options.append(kwargs) or compile(model, **kwargs))
    model, machine = random_model("plain"), Machine()
    compiled = maybe_compile(model, wanted, machine)
    assert compiled._orig_mod is model and options == [{"dynamic": False}]
    assert compiler == ["cpu"] and not machine.printed


def test_not_wanted_or_done_by_accelerate_nothing_is_tried(compiler):
    model = random_model("plain")
    assert maybe_compile(model, False, Machine()) is model
    assert maybe_compile(model, True, Machine(DynamoBackend.INDUCTOR)) is model
    assert not compiler


def test_a_compiler_that_miscalculates_is_no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: lambda x: function(x) + 1)
    assert compiler_available("cpu") == (False, "compiled functions give wrong results")


@pytest.mark.parametrize("message", ["first line\nsecond line", "\n  first line  \n"])
def test_any_failure_is_an_answer_and_fits_a_line(monkeypatch, message):
    def fail(function, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", fail)
    assert compiler_available("cpu") == (False, "first line")


def test_a_wish_that_cannot_be_met_is_an_error(monkeypatch):
    monkeypatch.setattr(device, "compiler_available", lambda device: (False, "Triton is missing"))
    with pytest.raises(UserError, match=r"no compiler works here \(Triton is missing\)"):
        maybe_compile(random_model("plain"), True, Machine())


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_a_compiled_training_pass_is_the_uncompiled_one(architecture):
    model, machine = random_model(architecture).train(), Machine()
    gradients = []
    for module in (model, maybe_compile(model, None, machine)):
        loss = module(input_ids=IDS, shift_labels=IDS, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
        model.zero_grad()
    assert machine.printed or type(module) is not type(model)  # no compiler: said so
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-3 * (1 + gradient.abs().max()), name
