"""What the compiler is given: which attention, in which dtypes, in how many graphs. No compiler is needed."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, shallow_model
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_nanochat.chat.decoding import CompiledDecoder
from recipes.training.attention import evaluation_attention

IDS = torch.arange(64).reshape(2, 32)
CAUSAL, MASKED, UNMASKED, BLOCKS = "causal", "masked", "unmasked", "block mask"
FLEX = torch.ops.higher_order.flex_attention
FULL = {"plain": 2, "turbo": 1}  # layers of each kind in `shallow_model`
SLIDING = {"plain": 0, "turbo": 2}


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them as they are.

    FlexAttention has no gradients then, only with those that AOTAutograd makes.
    """

    def __init__(self, autograd: bool = False):
        self.autograd = autograd

    def __call__(self, graph, example_inputs):
        self.append(graph)
        return aot_eager(graph, example_inputs) if self.autograd else graph.forward

    def calls(self, function) -> list[torch.fx.Node]:
        return [node for graph in self for node in graph.graph.nodes if node.target is function]

    def attention(self) -> Counter:
        """How many calls of attention there are of each kind, over all graphs."""
        kinds = Counter(kind(node.kwargs) for node in self.calls(F.scaled_dot_product_attention))
        return +(kinds + Counter({BLOCKS: len(self.calls(FLEX))}))


def kind(arguments: dict) -> str:
    if arguments.get("attn_mask") is not None:
        return MASKED
    return CAUSAL if arguments["is_causal"] else UNMASKED


def captured(model, autograd: bool = False, **options):
    torch.compiler.reset()
    graphs = Graphs(autograd)
    return torch.compile(model, backend=graphs, dynamic=False, **options), graphs


def precision(dtype: torch.dtype):
    return torch.autocast("cpu", dtype=torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()


def expected(architecture: str) -> Counter:
    return +Counter({CAUSAL: FULL[architecture], MASKED: SLIDING[architecture]})


def optimizer_step(module, dtype: torch.dtype, positions: torch.Tensor | None = None):
    """A pass as the loop makes it; the gradients are left."""
    with precision(dtype):
        items = torch.tensor(IDS.numel())
        documents = {} if positions is None else {"position_ids": positions}
        loss = module(input_ids=IDS, shift_labels=IDS, use_cache=False, num_items_in_batch=items, **documents).loss
    loss.backward()
    return loss


def graphs_of_training(model, dtype: torch.dtype, positions=(None,) * 5, autograd: bool = False) -> Graphs:
    """Of a step for each of `positions`; with evaluations of the uncompiled model in between there must be but one."""
    compiled, graphs = captured(model.train(), autograd)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step, documents in enumerate(positions):
        assert optimizer_step(compiled, dtype, documents).dtype == torch.float32
        if step % 2:
            model.eval()
            with torch.no_grad(), precision(dtype), evaluation_attention(model):
                model(input_ids=IDS[:1, :20], use_cache=False)
            model.train()
    assert len(graphs) == 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations + 1
    return graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_training_is_one_graph_with_causal_attention_in_full_layers(architecture, dtype):
    assert graphs_of_training(shallow_model(architecture), dtype).attention() == expected(architecture)


def test_windows_that_rows_do_not_fill_need_no_mask():
    model = shallow_model("turbo")
    model.config.sliding_window = IDS.shape[1]
    assert graphs_of_training(model, torch.float32).attention() == {CAUSAL: FULL["turbo"] + SLIDING["turbo"]}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_cosines_and_sines_are_computed_once(architecture):
    """Inductor would compute them in two kernels of every layer."""
    torch._dynamo.reset()
    model = shallow_model(architecture).train()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        _, (code,) = run_and_get_code(torch.compile(model, dynamic=False), input_ids=IDS, use_cache=False)
    vectorized = [code.count(f".{wave}()") for wave in ("cos", "sin")]
    assert max(vectorized) <= 1 and max(code.count(f"std::{wave}(") for wave in ("cos", "sin")) <= 1, vectorized
    assert "cos" in code


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_attention_s_output_is_not_copied(architecture, monkeypatch):
    """Its queries' layout is its output's, which the next product reads as it is."""
    model, attend, outputs, read = shallow_model(architecture).train(), F.scaled_dot_product_attention, [], []

    def attending(*args, **kwargs):
        outputs.append(attend(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attending)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(input_ids=IDS, use_cache=False)
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in outputs] and len(read) == len(model.model.layers)


@pytest.fixture
def flexible(monkeypatch):
    """A function that makes a model with FlexAttention, which here may also be trained on the CPU.

    torch refuses that as its compiler has no such kernel; what runs the captured graphs as they are does not need one.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)

    def make(architecture: str, model_of=shallow_model):
        model = model_of(architecture)
        model.set_attn_implementation("flex_attention")
        return model

    return make


def restarting(*lengths: int) -> torch.Tensor:
    """Positions of documents that are packed in the rows of `IDS`, other ones in the second row."""
    row = torch.cat([torch.arange(length) for length in lengths])
    return torch.stack([row, torch.cat([torch.arange(lengths[-1]), row[: -lengths[-1]]])])


PACKED = [restarting(*lengths) for lengths in ([20, 12], [5, 9, 18], [32], [3, 3, 3, 23], [16, 16])]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_flex_attention_windows_are_blocks_and_full_layers_causal(flexible, dtype):
    graphs = graphs_of_training(flexible("turbo"), dtype, autograd=True)
    assert graphs.attention() == {CAUSAL: FULL["turbo"], BLOCKS: SLIDING["turbo"]}
    assert len({block_mask(node) for node in graphs.calls(FLEX)}) == 1  # one mask for all layers


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_with_flex_attention_packed_documents_are_blocks(flexible, architecture):
    graphs = graphs_of_training(flexible(architecture), torch.float32, PACKED, autograd=True)
    assert graphs.attention() == {BLOCKS: FULL[architecture] + SLIDING[architecture]}
    kinds = 2 if SLIDING[architecture] else 1
    assert len({block_mask(node) for node in graphs.calls(FLEX)}) == kinds


def block_mask(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The tensors of the block mask that a call is given: counts and indices of the blocks."""
    return tuple(part for part in node.args[4] if isinstance(part, torch.fx.Node) and part.op != "get_attr")


@pytest.mark.slow
@pytest.mark.parametrize("positions", [None, PACKED[1]])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_flex_attention_gives_the_loss_and_gradients_of_sdpa(flexible, architecture, positions):
    """In float64: the scalars' gradients are sums over everything, and float32 rounding hides other differences."""
    reference, model = (
        random_model(architecture).double().train(),
        flexible(architecture, random_model).double().train(),
    )
    loss = optimizer_step(reference, torch.float32, positions)
    assert optimizer_step(captured(model, autograd=True)[0], torch.float32, positions).item() == pytest.approx(
        loss.item(), rel=1e-6
    )
    for (name, one), other in zip(reference.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            assert (one.grad - other.grad).norm() <= 1e-6 * one.grad.norm() + 1e-9, name  # the loss is of float32


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_an_evaluation_is_one_graph_with_causal_attention_in_full_layers(architecture):
    compiled, graphs = captured(shallow_model(architecture))
    for _ in range(2):
        with torch.no_grad():
            assert compiled(input_ids=IDS, use_cache=False).logits.dtype == torch.float32
    assert len(graphs) == 1 and graphs.attention() == expected(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_decoding_steps_in_a_static_cache_are_one_graph_with_a_mask(architecture):
    """The mask is what leaves out the part of the cache that is still empty."""
    model = shallow_model(architecture)
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
    model = shallow_model(architecture).train()
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
    model = shallow_model(architecture).train()
    with NoLooking():
        loss = model(input_ids=IDS, shift_labels=IDS, use_cache=False).loss
        loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_positions_that_are_given_count_as_before(architecture):
    model = shallow_model(architecture)
    positions = torch.arange(32).expand(2, -1)
    restarting = positions % 16
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(model(input_ids=IDS, position_ids=positions, use_cache=False).logits, plain)
        packed = model(input_ids=IDS, position_ids=restarting, use_cache=False).logits
        alone = model(input_ids=IDS[:, 16:], use_cache=False).logits
    assert (packed[:, 16:] - alone).abs().max() < 1e-4 and not torch.equal(packed, plain)


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_other_backends_are_still_causal(backend, architecture):
    model = shallow_model(architecture)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        model.set_attn_implementation(backend)
        assert (model(input_ids=IDS, use_cache=False).logits - wanted).abs().max() < 1e-3
