"""What training keeps of each layer between forward and backward pass: bytes per token, eager and compiled."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from modeling_nanochat.modeling_nanochat import NanoChatMLP

WIDTH, HEADS, ROWS, LENGTH = 64, 2, 2, 32
IDS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)


def make_model(layers: int) -> NanoChatForCausalLM:
    torch.manual_seed(0)
    config = NanoChatConfig(vocab_size=128, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS)
    return NanoChatForCausalLM(config).train()


def forward(module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(input_ids=IDS, shift_labels=IDS, use_cache=False).loss


def saved_bytes(run, weights) -> int:
    """Bytes of what autograd saves in `run`, each storage once, without the weights."""
    known, kept = {weight.untyped_storage().data_ptr() for weight in weights}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, or another tensor would take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in kept.values())


def saved_eagerly(layers: int) -> int:
    model = make_model(layers)
    return saved_bytes(lambda: forward(model), model.parameters())


def saved_compiled(layers: int) -> int:
    """What Inductor's partitioner hands from the forward to the backward graph."""
    found = []

    def partition(joint, inputs, **options):
        forward_graph, backward_graph = min_cut_rematerialization_partition(
            joint, inputs, compiler="inductor", **options
        )
        found.append((forward_graph, options["num_fwd_outputs"]))
        return forward_graph, backward_graph

    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    forward(torch.compile(make_model(layers), backend=backend, dynamic=False)).backward()
    ((graph, outputs),) = found
    saved = graph.graph.output_node().args[0][outputs:]
    computed = {node for node in saved if isinstance(node, torch.fx.Node) and node.op != "placeholder"}
    values = [node.meta["val"] for node in computed]
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "most"), [(saved_eagerly, 38), (saved_compiled, 30)])
def test_a_layer_keeps_this_many_bytes_per_token_and_channel(saved, most):
    """In bfloat16; without the weights' casts, and a few numbers per token and head of norms and softmax."""
    casts, few = 2 * 12 * WIDTH * WIDTH, 4 * (2 + 3 * HEADS)
    layer = saved(3) - saved(2) - casts
    assert layer <= ROWS * LENGTH * (most * WIDTH + few)


class Reference(NanoChatMLP):
    """Everything stored."""

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_and_gradients_are_bit_identical_to_those_with_everything_stored(activation, compiled):
    config = SimpleNamespace(hidden_act=activation, hidden_size=16, intermediate_size=64)
    results = []
    for kind in (Reference, NanoChatMLP):
        torch.manual_seed(0)
        mlp, rows = kind(config).train(), torch.randn(5, 16, requires_grad=True)
        output = (torch.compile(mlp, backend="aot_eager") if compiled else mlp)(rows)
        output.square().sum().backward()
        results.append([output, rows.grad, mlp.fc1.weight.grad, mlp.fc2.weight.grad])
    assert all(torch.equal(ours, expected) for expected, ours in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_checkpointed_layers_have_the_same_gradients(architecture):
    """A layer that is computed again as a whole computes its activation again within that."""
    model, gradients = random_model(architecture).train(), []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for others in gradients[1:]:
        assert all(torch.equal(mine, other) for mine, other in zip(gradients[0], others, strict=True))


def test_a_layer_that_is_no_linear_one_is_called_once():
    """Adapters and quantizers put their own in its place, whose work may be more than a product."""

    class Adapted(nn.Linear):
        calls = 0

        def forward(self, rows):
            self.calls += 1
            return super().forward(rows)

    mlp = NanoChatMLP(SimpleNamespace(hidden_act="relu2", hidden_size=8, intermediate_size=16)).train()
    mlp.fc2 = Adapted(16, 8, bias=False)
    mlp(torch.randn(3, 8)).sum().backward()
    assert mlp.fc2.calls == 1
