"""The dtypes that the compiler gets: loss, hidden states, gradients, attention; in training, evaluation, decoding."""

import pytest
import torch
import torch.nn.functional as F
from conftest import shallow_model
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from modeling_nanochat.chat.decoding import CompiledDecoder

IDS = torch.arange(64).reshape(2, 32)
TOKENS, WIDTH = IDS.numel(), 64


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __call__(self, graph, example_inputs):
        self.append(graph)
        return graph.forward

    def nodes(self, target):
        return [node for graph in self for node in graph.graph.nodes if node.target is target]


def captured(function, **options):
    torch.compiler.reset()
    graphs = Graphs()
    return torch.compile(function, backend=graphs, dynamic=False, **options), graphs


def autocast(dtype: torch.dtype):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def value(node) -> torch.Tensor:
    return node.meta["example_value"]


def attention_dtypes(graphs: Graphs) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the queries, keys and values that attention is called with, and of its masks."""
    calls = graphs.nodes(F.scaled_dot_product_attention)
    assert calls
    numbers = {value(argument).dtype for node in calls for argument in node.args[:3]}
    masks = [mask for node in calls if (mask := node.kwargs.get("attn_mask")) is not None]
    return numbers, {value(mask).dtype for mask in masks}


class Passes:
    """Forward and backward graphs of a model in training, as the compiler's partitioner cuts them."""

    def __init__(self, model, dtype: torch.dtype):
        torch.compiler.reset()
        self.forward, self.backward = [], []
        backend = aot_autograd(
            fw_compiler=self.keep(self.forward),
            bw_compiler=self.keep(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        compiled = torch.compile(model, backend=backend, dynamic=False)
        for _ in range(2):
            model.zero_grad()
            with autocast(dtype):
                self.loss = compiled(
                    input_ids=IDS, shift_labels=IDS, use_cache=False, num_items_in_batch=torch.tensor(TOKENS)
                ).loss
            self.loss.backward()

    @staticmethod
    def keep(kept: list):
        def compile_nothing(graph, example_inputs):
            kept.append(graph)
            return graph.forward

        return compile_nothing

    def saved(self) -> list[torch.Tensor]:
        """What the forward graph hands to the backward graph for every token, activations that is."""
        outputs = self.forward[0].graph.output_node().args[0]
        values = [
            node.meta["val"]
            for node in outputs
            if hasattr(node, "meta") and isinstance(node.meta.get("val"), torch.Tensor)
        ]
        return [
            tensor
            for tensor in values
            if tensor.numel() >= TOKENS * WIDTH and TOKENS in (tensor.shape[0], tensor[..., 0].numel())
        ]

    def gradients(self) -> list[torch.Tensor]:
        outputs = self.backward[0].graph.output_node().args[0]
        return [node.meta["val"] for node in outputs if hasattr(node, "meta")]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_training_keeps_activations_in_the_precision_of_products(architecture, dtype):
    model = shallow_model(architecture).train()
    passes = Passes(model, dtype)
    assert len(passes.forward) == len(passes.backward) == 1, "one graph each, in both steps"
    assert passes.loss.dtype == torch.float32
    assert {gradient.dtype for gradient in passes.gradients()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert len(passes.saved()) > 5 * model.config.num_hidden_layers
    assert {tensor.dtype for tensor in passes.saved()} == {dtype}, "an activation in float32 takes twice the memory"


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_training_asks_for_attention_in_the_precision_of_products(architecture, dtype):
    compiled, graphs = captured(shallow_model(architecture).train())
    with autocast(dtype):
        compiled(input_ids=IDS, shift_labels=IDS, use_cache=False).loss.backward()
    numbers, masks = attention_dtypes(graphs)
    assert numbers == {dtype} and masks <= {torch.bool}


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_an_evaluation_has_float32_logits_from_products_in_autocasts_precision(architecture, dtype):
    """Also twice and between steps of training: the same graph."""
    model = shallow_model(architecture)
    compiled, graphs = captured(model)
    for _ in range(3):
        with torch.no_grad(), autocast(dtype):
            logits = compiled(input_ids=IDS, use_cache=False).logits
    assert len(graphs) == 1
    assert logits.dtype == torch.float32
    numbers, masks = attention_dtypes(graphs)
    assert numbers == {dtype} and masks <= {torch.bool}


@pytest.mark.parametrize("way", ["weights", "autocast"])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_decoding_in_bfloat16_is_one_graph_over_a_bfloat16_cache(architecture, way):
    model = shallow_model(architecture)
    model = model.to(torch.bfloat16) if way == "weights" else model
    decoder = CompiledDecoder(model)
    decoder.compiled, graphs = captured(model.forward, fullgraph=True)
    with torch.no_grad(), autocast(torch.bfloat16 if way == "autocast" else torch.float32):
        first = decoder.prefill(IDS[:, :20].tolist(), max_new_tokens=10)
        steps = [decoder.step([token, token]) for token in range(4)]
        again = decoder.prefill(IDS[:, 1:19].tolist(), max_new_tokens=10)  # fits into the cache that is there
        steps += [decoder.step([token, token]) for token in range(3)]
    assert len(graphs) == 1
    assert {logits.dtype for logits in (first, again, *steps)} == {torch.float32}
    assert {part.dtype for layer in decoder.cache.layers for part in (layer.keys, layer.values)} == {torch.bfloat16}
    numbers, masks = attention_dtypes(graphs)
    assert numbers == {torch.bfloat16} and masks == {torch.bool}
