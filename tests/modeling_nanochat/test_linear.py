"""Few rows through a linear layer: the same numbers, and no tool that replaces or hooks the layer is passed over."""

import pytest
import torch
from packaging.version import Version
from torch import nn

from modeling_nanochat.linear import linear


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 5), (4, 7), (0, 1)])
@pytest.mark.parametrize("width", [32, 30])
def test_few_rows_and_many_give_what_the_layer_gives(shape, width):
    layer = nn.Linear(16, width, bias=False)
    hidden_states = torch.randn(*shape, 16)
    expected = layer(hidden_states)
    with torch.no_grad():
        assert torch.allclose(linear(layer, hidden_states), expected, atol=1e-6)
    assert linear(layer, hidden_states).requires_grad


def called(layer):
    """Whether one row in evaluation goes through the layer's own call."""
    calls = []
    forward = layer.forward
    layer.forward = lambda hidden_states: calls.append(1) or forward(hidden_states)
    with torch.no_grad():
        linear(layer, torch.randn(1, 16))
    return bool(calls)


class Adapted(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(16, 32, bias=False)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def sharded():
    layer = nn.Linear(16, 32, bias=False)
    layer.weight = nn.Parameter(layer.weight[:, :].clone().detach()[:16])
    return layer


@pytest.mark.parametrize(
    "make",
    [hooked, sharded, lambda: Adapted(16, 32, bias=False), lambda: nn.Linear(16, 32), lambda: nn.Linear(16, 31)],
)
def test_whatever_is_more_than_a_weight_is_called(make):
    assert called(make())


def test_a_plain_layer_is_not():
    assert not called(nn.Linear(16, 32, bias=False))


def test_every_layer_of_both_architectures_is_what_quantizers_look_for(either_model):
    layers = [module for module in either_model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) > 15 and all(type(layer) is nn.Linear for layer in layers)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="until 2.13 torch does not see that min(16 x, 32 x) is 16 x"
)
def test_the_model_exports_with_a_length_left_open(either_model):
    length = torch.export.Dim("length", min=3, max=200)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = either_model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        exported = torch.export.export(Logits(), (ids,), dynamic_shapes={"ids": {1: length}})
        for part in (ids, ids[:, :5]):
            assert torch.allclose(exported.module()(part), either_model(part).logits, atol=2e-4)
