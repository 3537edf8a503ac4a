import weakref
from functools import partial

import psutil
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from conftest import random_model

from modeling_nanochat import NanoChatConfig, NanoChatTurboConfig
from modeling_nanochat.errors import UserError
from recipes import batch_size
from recipes.batch_size import (
    CPU_TOKENS,
    STATE_BYTES,
    activation_bytes,
    explain_out_of_memory,
    find_batch_size,
    is_out_of_memory,
    smallest,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def on_cuda(monkeypatch):
    """No CUDA device is needed; holds what was asked for: bytes for the optimizer's state, and cleaning after a trial."""
    asked = {"bytes": [], "thorough": []}

    def clear(garbage_collection):
        asked["thorough"].append(garbage_collection)

    monkeypatch.setattr(batch_size, "take_memory", lambda size, device: asked["bytes"].append(size))
    monkeypatch.setattr(batch_size, "clear_device_cache", clear)
    return asked


class Memory:
    """A trial that runs out of memory above `limit` rows; its tensors live as long as the error does."""

    def __init__(self, limit: int):
        self.limit, self.tried, self.held = limit, [], []

    def __call__(self, rows: int) -> None:
        assert not any(tensor() is not None for tensor in self.held), "what a failed trial held was not let go"
        self.tried.append(rows)
        activations = torch.zeros(rows)
        self.held.append(weakref.ref(activations))
        if rows > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {activations.nbytes} bytes")


@pytest.mark.parametrize(
    "rows, limit, expected", [(64, 1000, 64), (64, 20, 16), (64, 1, 1), (60, 13, 12), (7, 5, 1), (30, 14, 10)]
)
def test_the_largest_divisor_that_fits(on_cuda, rows, limit, expected):
    memory = Memory(limit)
    assert find_batch_size(random_model("plain"), 256, rows, CUDA, memory) == expected
    assert memory.tried[-1] == expected and all(rows % tried == 0 for tried in memory.tried)
    assert memory.tried == sorted(memory.tried, reverse=True)


def test_room_is_left_for_the_optimizer(on_cuda):
    model = random_model("turbo")
    model.lm_head.weight.requires_grad_(False)
    find_batch_size(model, 256, 4, CUDA, Memory(4))
    assert on_cuda["bytes"] == [STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)]


def test_the_cache_is_emptied_after_every_trial(on_cuda):
    find_batch_size(random_model("plain"), 256, 8, CUDA, Memory(2))
    assert on_cuda["thorough"] == [True, True, False]


def test_no_gradient_of_a_trial_is_left(on_cuda):
    model = random_model("plain").train()
    ids = torch.randint(0, 500, (8, 16))

    def trial(rows):
        model(ids[:rows], shift_labels=ids[:rows], use_cache=False).loss.backward()
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert find_batch_size(model, 16, 8, CUDA, trial) == 2
    assert all(p.grad is None for p in model.parameters())


def test_not_even_one_row_says_what_to_change(on_cuda):
    with pytest.raises(UserError, match="out of memory with 1 row of 256 tokens.*lower max_length to 128.*fsdp2"):
        find_batch_size(random_model("plain"), 256, 8, CUDA, Memory(0))


def test_any_other_error_is_not_hidden(on_cuda):
    def trial(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_batch_size(random_model("plain"), 256, 8, CUDA, trial)


def test_a_gpu_is_not_given_more_than_speeds_it_up(on_cuda):
    memory = Memory(10**9)
    assert find_batch_size(random_model("plain"), 2048, 512, CUDA, memory) == 64
    assert memory.tried == [64]


def on_two_processes(path):
    accelerator = Accelerator(cpu=True)
    memory = Memory((12, 5)[accelerator.process_index])
    batch_size.take_memory = lambda size, device: None  # this process has no CUDA device
    agree = partial(smallest, accelerator)
    found = find_batch_size(random_model("plain"), 256, 24, CUDA, memory, agree)
    (path / str(accelerator.process_index)).write_text(f"{found} {memory.tried}")
    accelerator.wait_for_everyone()


def test_processes_agree_and_try_the_same(tmp_path):
    debug_launcher(on_two_processes, (tmp_path,), num_processes=2)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "4 [24, 12, 8, 6, 4]"


def never(rows):
    raise AssertionError("no trial outside CUDA")


def with_free_memory(monkeypatch, gigabytes: float):
    free = psutil.virtual_memory()._replace(available=int(gigabytes * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


@pytest.mark.parametrize("max_length, expected", [(256, 16), (512, 8), (8192, 1)])
def test_a_cpu_gets_what_its_caches_hold(monkeypatch, max_length, expected):
    with_free_memory(monkeypatch, 64)
    assert find_batch_size(random_model("plain"), max_length, 64, CPU, never) == expected
    assert expected == 1 or expected * max_length == CPU_TOKENS


def test_little_memory_means_few_rows_and_processes_share_it(monkeypatch):
    model = random_model("plain")
    found = []
    for gigabytes in (64, 0.55, 0.46, 0.1):
        with_free_memory(monkeypatch, gigabytes)
        found.append(find_batch_size(model, 256, 16, CPU, never))
    assert found[0] == 16 and found == sorted(found, reverse=True) and found[-1] == 1 and len(set(found)) >= 3
    with_free_memory(monkeypatch, 1.0)
    alone = find_batch_size(model, 256, 16, CPU, never)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_batch_size(model, 256, 16, CPU, never) < alone
    assert find_batch_size(model, 256, 16, CPU, never, agree=lambda rows: min(rows, 1)) == 1


def saved_bytes(model, rows: int, length: int) -> int:
    """What autograd keeps of a forward pass, each storage once."""
    sizes, kept = {}, []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept.append(tensor)  # alive until the end, or another tensor takes its address
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 500, (rows, length))
    positions = (torch.arange(length) % 50).expand(rows, length)  # packed documents: their mask is the largest
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, position_ids=positions, shift_labels=ids, use_cache=False)
    return sum(size for address, size in sizes.items() if address not in weights)


@pytest.mark.parametrize("kind", [NanoChatConfig, NanoChatTurboConfig])
@pytest.mark.parametrize("layers, width, length", [(2, 128, 256), (6, 64, 256), (3, 192, 512)])
def test_the_estimate_is_a_little_more_than_what_is_held(kind, layers, width, length):
    config = kind(vocab_size=500, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4)
    config.max_position_embeddings = length
    model = {NanoChatConfig: "plain", NanoChatTurboConfig: "turbo"}[kind]
    model = type(random_model(model))(config).train()
    held = saved_bytes(model, 4, length)
    estimate = activation_bytes(config, length, 4, CPU) - activation_bytes(config, length, 0, CPU)
    assert held <= estimate <= 1.5 * held


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_explanation_says_which_setting_to_lower_and_to_what():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
    explained = explain_out_of_memory(error, 32, 2048)
    assert isinstance(explained, UserError) and "\n" not in str(explained)
    assert "with 32 rows of 2048 tokens" in str(explained) and "per_device_train_batch_size to 16;" in str(explained)
    assert "Tried to allocate 2.00 GiB" in str(explained)
    assert "per_device_train_batch_size to 5;" in str(explain_out_of_memory(error, 15, 2048))
    assert "lower max_length to 1024" in str(explain_out_of_memory(MemoryError(), 1, 2048))
