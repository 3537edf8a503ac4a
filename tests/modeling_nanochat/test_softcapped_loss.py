"""The chunked loss against the whole logits: same value, same gradients, little memory."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from datasets import Dataset
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from modeling_nanochat.softcapped_loss import chunk_logits, softcapped_cross_entropy
from recipes.training.trl.settings import SFTSettings


def whole(hidden_states, weight, targets, softcap):
    logits = (hidden_states @ weight.t()).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def loss_and_gradients(function, hidden_states, weight, targets, softcap, **options):
    hidden_states, weight = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden_states, weight, targets, softcap, **options)
    (loss / len(targets)).backward()
    return loss.detach() / len(targets), hidden_states.grad, weight.grad


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    chunk_rows=st.integers(1, 50),
    softcap=st.sampled_from([15.0, 5.0, 30.0, 100.0, None]),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_those_of_the_whole_logits(rows, vocabulary, chunk_rows, softcap, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = scale * torch.randn(rows, 8, generator=generator)
    weight = torch.randn(vocabulary, 8, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = -100
    expected = loss_and_gradients(whole, hidden_states, weight, targets, softcap)
    ours = loss_and_gradients(softcapped_cross_entropy, hidden_states, weight, targets, softcap, chunk_rows=chunk_rows)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_logits_far_beyond_the_cap_neither_overflow_nor_vanish():
    hidden_states, weight = torch.full((3, 4), 1e4), torch.tensor([[1.0] * 4, [-1.0] * 4, [0.0] * 4])
    ours = loss_and_gradients(softcapped_cross_entropy, hidden_states, weight, torch.tensor([0, 1, 2]), 15.0)
    expected = loss_and_gradients(whole, hidden_states, weight, torch.tensor([0, 1, 2]), 15.0)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.isfinite(mine).all() and torch.allclose(mine, theirs, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_stays_close(dtype):
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(64, 32), 0.2 * torch.randn(300, 32)
    targets = torch.randint(0, 300, (64,))
    expected = loss_and_gradients(whole, hidden_states, weight, targets, 15.0)
    with torch.autocast("cpu", dtype=dtype):
        ours = loss_and_gradients(softcapped_cross_entropy, hidden_states, weight, targets, 15.0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6  # float16 is not used for it: float32 is
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_what_does_not_fit_is_refused():
    hidden_states, weight = torch.randn(4, 8), torch.randn(10, 8)
    with pytest.raises(ValueError, match="3.* targets for .*4"):
        softcapped_cross_entropy(hidden_states, weight, torch.zeros(3, dtype=torch.long), 15.0)
    for wrong in (-1, 10):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            softcapped_cross_entropy(hidden_states, weight, torch.tensor([1, wrong, 2, 3]), 15.0)
    model, ids = random_model("plain").train(), torch.arange(60).reshape(2, 30)
    with pytest.raises(ValueError, match="targets"):
        model(ids, labels=ids, logits_to_keep=8)


def test_another_ignored_target_can_be_named():
    hidden_states, weight = torch.randn(4, 8), torch.randn(10, 8)
    with_own = softcapped_cross_entropy(hidden_states, weight, torch.tensor([1, -1, 2, -1]), 15.0, ignore_index=-1)
    usual = softcapped_cross_entropy(hidden_states, weight, torch.tensor([1, -100, 2, -100]), 15.0)
    assert with_own == usual


def test_only_the_gradients_asked_for_are_made_and_only_once():
    hidden_states, weight, targets = torch.randn(4, 8), torch.randn(10, 8), torch.arange(4)
    for moving, frozen in ((hidden_states, weight), (weight, hidden_states)):
        moving.requires_grad_()
        softcapped_cross_entropy(hidden_states, weight, targets, 15.0).backward()
        expected = torch.autograd.grad(whole(hidden_states, weight, targets, 15.0), moving)[0]
        assert torch.allclose(moving.grad, expected, atol=1e-5) and frozen.grad is None
        loss = softcapped_cross_entropy(hidden_states, weight, targets, 15.0)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, moving, create_graph=True)
        moving.grad = None
        moving.requires_grad_(False)


def test_without_gradients_only_the_loss_is_made():
    weight = torch.randn(50, 8, requires_grad=True)
    with torch.no_grad():
        loss = softcapped_cross_entropy(torch.randn(7, 8), weight, torch.arange(7), 15.0)
    assert not loss.requires_grad and loss > 0


def test_no_buffer_of_the_size_of_all_logits_is_made():
    hidden_states, weight = torch.randn(1024, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        softcapped_cross_entropy(
            hidden_states, weight, torch.randint(0, 4096, (1024,)), 15.0, chunk_rows=64
        ).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4 * 1024 * 4096 / 4  # a quarter of the logits' bytes


def test_the_model_in_training_returns_the_same_loss_and_no_logits():
    for architecture in ("plain", "turbo"):
        model, ids = random_model(architecture), torch.arange(80).reshape(2, 40)
        labels = ids.masked_fill(ids % 5 == 0, -100)
        with torch.no_grad():
            usual = model(ids, labels=labels, use_cache=False)
            chunked = model.train()(ids, labels=labels, use_cache=False)
            both = model(ids, labels=labels, use_cache=False, skip_logits=False)
        assert chunked.logits is None and both.logits is not None
        assert chunked.loss.item() == pytest.approx(usual.loss.item(), abs=1e-5)
        assert both.loss.item() == usual.loss.item()


def test_trl_computes_the_loss_of_the_models_own_logits(toy_model_and_tokenizer, tmp_path):
    """TRL's trainers run the backbone and multiply by the head themselves."""
    _, tokenizer = toy_model_and_tokenizer
    for architecture in ("plain", "turbo"):
        model = random_model(architecture)
        ids = torch.arange(40, 140).reshape(2, 50)
        labels = ids.masked_fill(ids % 3 == 0, -100)
        expected = cross_entropy(model(ids, use_cache=False).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        data = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
        arguments = SFTSettings(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=64)
        trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
        trainer.model.eval()
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        loss = trainer.compute_loss(trainer.model, inputs)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def compiled_loss(softcap: float | None, dtype: torch.dtype):
    """The compiled loss and gradients of three chunks and a half, the operators in it, and what went into it."""
    operators = []

    def keep(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    torch.compiler.reset()
    torch.manual_seed(0)
    hidden_states, weight, targets = torch.randn(56, 12), torch.randn(50, 12), torch.randint(0, 50, (56,))
    targets[::5] = -100
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(softcapped_cross_entropy, backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = loss_and_gradients(compiled, hidden_states, weight, targets, softcap, chunk_rows=16)
    return ours, operators, (hidden_states, weight, targets, softcap)


@pytest.mark.parametrize("softcap", [15.0, 100.0, None])
def test_compiled_value_and_gradients_are_those_of_the_whole_logits(softcap):
    ours, _, given = compiled_loss(softcap, torch.float32)
    for mine, theirs in zip(ours, loss_and_gradients(whole, *given), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_compiled_in_bfloat16_nothing_is_scattered_and_the_numbers_are_those_of_eager():
    ours, operators, given = compiled_loss(15.0, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(softcapped_cross_entropy, *given, chunk_rows=16)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32 and torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)
    assert any("where" in name for name in operators) and not any("scatter_add" in name for name in operators)


@pytest.mark.parametrize(
    ("gigabytes", "logits"), [(8, 2**27), (24, 2**27), (40, 2**28), (48, 2**28), (79, 2**29), (141, 2**29)]
)
def test_chunks_are_larger_where_there_is_more_memory(monkeypatch, gigabytes, logits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert chunk_logits(torch.device("cuda:0")) == logits


def test_on_other_devices_chunks_are_small():
    assert chunk_logits(torch.device("cpu")) < chunk_logits(torch.device("mps")) < 2**28
