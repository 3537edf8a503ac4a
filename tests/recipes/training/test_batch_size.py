import weakref
from contextlib import contextmanager
from functools import partial

import psutil
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from conftest import random_model

from modeling_nanochat import NanoChatConfig, NanoChatTurboConfig
from modeling_nanochat.errors import UserError
from recipes.training import batch_size
from recipes.training.batch_size import (
    CPU_TOKENS,
    activation_bytes,
    explain_out_of_memory,
    find_batch_size,
    is_out_of_memory,
    smallest,
)
from recipes.training.stopping import Outcomes

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def without_cuda():
    """Run a trial without counting its bytes, for which a CUDA device would be needed."""
    batch_size.peak_bytes = lambda function, device: function() or 0


@pytest.fixture
def on_cuda(monkeypatch):
    """No CUDA device is needed; holds how the cache was emptied after each trial."""
    thorough = []
    monkeypatch.setattr(batch_size, "peak_bytes", batch_size.peak_bytes)
    without_cuda()

    def clear(garbage_collection):
        thorough.append(garbage_collection)

    monkeypatch.setattr(batch_size, "clear_device_cache", clear)
    return thorough


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


def test_the_cache_is_emptied_after_every_trial(on_cuda):
    find_batch_size(random_model("plain"), 256, 8, CUDA, Memory(2))
    assert on_cuda == [True, True, False]


class Device:
    """A CUDA device on which a row takes 100 bytes, or `compiled_row` bytes compiled, beside the gradients."""

    def __init__(self, monkeypatch, model, free: int, compiled_row: int = 80):
        self.gradients = 4 * sum(p.numel() for p in model.parameters())
        self.free, self.compiled_row = self.gradients + free, compiled_row
        self.compiled, self.used, self.tried = True, 0, []
        monkeypatch.setattr(batch_size, "peak_bytes", lambda function, device: (function(), self.used)[1])
        monkeypatch.setattr(batch_size, "free_bytes", lambda device: self.free)
        monkeypatch.setattr(torch.compiler, "set_stance", self.stance)

    @contextmanager
    def stance(self, name: str):
        assert name == "force_eager"
        self.compiled = False
        yield
        self.compiled = True

    def trial(self, rows: int) -> None:
        self.tried.append(rows if self.compiled else -rows)
        self.used = self.gradients + rows * (self.compiled_row if self.compiled else 100)
        if self.used > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    "free, compiled_row, expected, tried",
    [
        (6400, 80, 64, [-64, 64]),
        (2800, 80, 32, [-64, -32, -16, 32]),
        (2600, 80, 16, [-64, -32, -16, 16]),  # 32 are not worth compiling
        (2800, 90, 16, [-64, -32, -16, 32, 16]),
        (1600, 110, 8, [-64, -32, -16, 16, 8]),  # what was found uncompiled is no promise
        (90, 80, 1, [-64, -32, -16, -8, -4, -2, -1, 1]),
    ],
)
def test_a_pass_that_will_be_compiled_is_tried_compiled_and_few_sizes_are(
    on_cuda, monkeypatch, free, compiled_row, expected, tried
):
    model = random_model("plain")
    device = Device(monkeypatch, model, free, compiled_row)
    assert find_batch_size(model, 256, 64, CUDA, device.trial, compiled=True) == expected
    assert device.tried == tried


def test_what_is_compiled_runs_uncompiled_where_sizes_are_only_tried(on_cuda, monkeypatch):
    compiled_sizes = []

    def backend(graph, example_inputs):
        compiled_sizes.append(example_inputs[0].shape[0])
        return graph.forward

    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 0)
    monkeypatch.setattr(batch_size, "peak_bytes", lambda function, device: (function(), 2**40)[1])
    square = torch.compile(lambda x: x * x, backend=backend, dynamic=False)

    def trial(rows):
        square(torch.ones(rows))
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert find_batch_size(random_model("plain"), 256, 16, CUDA, trial, compiled=True) == 4
    assert compiled_sizes == [4]


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


def on_two_processes(path, by_store):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    memory = Memory((12, 5)[accelerator.process_index])
    without_cuda()
    agree = Outcomes().smallest if by_store else partial(smallest, accelerator)
    found = find_batch_size(random_model("plain"), 256, 24, CUDA, memory, agree)
    (path / str(accelerator.process_index)).write_text(f"{found} {memory.tried}")
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("by_store", [False, True])
def test_processes_agree_and_try_the_same(tmp_path, by_store):
    debug_launcher(on_two_processes, (tmp_path, by_store), num_processes=2)
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
    with_free_memory(monkeypatch, 0.55)
    alone = find_batch_size(model, 256, 16, CPU, never)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_batch_size(model, 256, 16, CPU, never) < alone
    assert find_batch_size(model, 256, 16, CPU, never, agree=lambda rows: min(rows, 1)) == 1


@pytest.mark.parametrize("most, expected", [(1, 1), (5, 4), (16, 16), (99, 16), (None, 16)])
def test_no_more_rows_than_allowed_are_chosen(monkeypatch, most, expected):
    with_free_memory(monkeypatch, 64)
    assert find_batch_size(random_model("plain"), 256, 16, CPU, never, most_rows=most) == expected


def test_the_optimizer_state_of_a_process_is_left_room_for(monkeypatch):
    model = random_model("plain")
    for expected, state in ((16, 0), (1, 2**30)):
        with_free_memory(monkeypatch, 1.0)
        assert find_batch_size(model, 256, 16, CPU, never, state_bytes=state) == expected


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
