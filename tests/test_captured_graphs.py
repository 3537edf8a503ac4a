"""What the compiler is given: which attention is asked for, in which dtypes, in how many graphs. No compiler is needed."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_nanochat.decoding import CompiledDecoder

IDS = torch.arange(64).reshape(2, 32)
CAUSAL, MASKED, UNMASKED = "causal", "masked", "unmasked"
FULL = {"plain": 3, "turbo": 2}  # layers of each kind in `random_model`
SLIDING = {"plain": 0, "turbo": 3}


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __call__(self, graph, example_inputs):
        self.append(graph)
        return graph.forward

    def attention(self) -> Counter:
        """How many calls of attention there are of each kind, over all graphs."""
        nodes = [node for graph in self for node in graph.graph.nodes]
        return Counter(kind(node.kwargs) for node in nodes if node.target is F.scaled_dot_product_attention)


def kind(arguments: dict) -> str:
    if arguments.get("attn_mask") is not None:
        return MASKED
    return CAUSAL if arguments["is_causal"] else UNMASKED


def captured(model, **options):
    torch.compiler.reset()
    graphs = Graphs()
    return torch.compile(model, backend=graphs, dynamic=False, **options), graphs


def precision(dtype: torch.dtype):
    return torch.autocast("cpu", dtype=torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()


def expected(architecture: str) -> Counter:
    return +Counter({CAUSAL: FULL[architecture], MASKED: SLIDING[architecture]})


def optimizer_step(module, dtype: torch.dtype):
    """A pass as the loop makes it; the gradients are left."""
    with precision(dtype):
        items = torch.tensor(IDS.numel())
        loss = module(input_ids=IDS, shift_labels=IDS, use_cache=False, num_items_in_batch=items).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_training_is_one_graph_with_causal_attention_in_full_layers(architecture, dtype):
    model = random_model(architecture).train()
    compiled, graphs = captured(model)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(4):
        assert optimizer_step(compiled, dtype).dtype == torch.float32
        if step % 2:  # an evaluation in between, on the uncompiled model
            model.eval()
            with torch.no_grad(), precision(dtype):
                model(input_ids=IDS[:1, :20], use_cache=False)
            model.train()
    assert len(graphs) == 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations + 1
    assert graphs.attention() == expected(architecture)


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_an_evaluation_is_one_graph_with_causal_attention_in_full_layers(architecture):
    compiled, graphs = captured(random_model(architecture))
    for _ in range(2):
        with torch.no_grad():
            assert compiled(input_ids=IDS, use_cache=False).logits.dtype == torch.float32
    assert len(graphs) == 1 and graphs.attention() == expected(architecture)


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_decoding_steps_in_a_static_cache_are_one_graph_with_a_mask(architecture):
    """The mask is what leaves out the part of the cache that is still empty."""
    model = random_model(architecture)
    decoder = CompiledDecoder(model)
    decoder.compiled, graphs = captured(model.forward, fullgraph=True)
    with torch.no_grad():
        decoder.prefill(IDS[:, :20].tolist(), max_new_tokens=10)
        for token in range(4):
            decoder.step([token, token])
    memory = 1 if architecture == "turbo" else 0  # turbo recalls the previous token by attention
    assert len(graphs) == 1
    assert graphs.attention() == {MASKED: FULL[architecture] + SLIDING[architecture] + memory}


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_under_autocast_the_stream_is_bfloat16_and_the_loss_float32(architecture):
    model = random_model(architecture).train()
    with precision(torch.bfloat16):
        outputs = model(input_ids=IDS, shift_labels=IDS, use_cache=False, output_hidden_states=True)
        last = model.model(input_ids=IDS, use_cache=False).last_hidden_state
    assert {state.dtype for state in (*outputs.hidden_states, last)} == {torch.bfloat16}
    assert outputs.loss.dtype == torch.float32


class NoLooking(TorchDispatchMode):
    """Within it nothing reads a tensor's value into Python, for which an accelerator would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_an_eager_pass_without_positions_never_looks_at_values(architecture):
    model = random_model(architecture).train()
    with NoLooking():
        loss = model(input_ids=IDS, shift_labels=IDS, use_cache=False).loss
        loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_positions_that_are_given_count_as_before(architecture):
    model = random_model(architecture)
    positions = torch.arange(32).expand(2, -1)
    restarting = positions % 16
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(model(input_ids=IDS, position_ids=positions, use_cache=False).logits, plain)
        packed = model(input_ids=IDS, position_ids=restarting, use_cache=False).logits
        alone = model(input_ids=IDS[:, 16:], use_cache=False).logits
    assert (packed[:, 16:] - alone).abs().max() < 1e-4 and not torch.equal(packed, plain)


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_other_backends_are_still_causal(backend):
    model = random_model("plain")
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        model.set_attn_implementation(backend)
        assert (model(input_ids=IDS, use_cache=False).logits - wanted).abs().max() < 1e-3
