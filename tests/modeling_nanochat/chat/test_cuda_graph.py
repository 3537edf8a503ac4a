"""Capturing a call. A double stands in for CUDA: what a GPU adds, `recipes/benchmarks/gpu_check.py` checks (g10)."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.backends.cuda import cudnn_sdp_enabled

from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.chat import cuda_graph


@pytest.fixture
def cuda(monkeypatch):
    """CUDA whose graphs count how often they are replayed."""
    graph = SimpleNamespace(replays=0)

    def replay():
        graph.replays += 1

    stream = SimpleNamespace(wait_stream=lambda other: None)
    double = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda stream: contextlib.nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=replay),
        graph=lambda graph, capture_error_mode: contextlib.nullcontext(),
    )
    monkeypatch.setattr(cuda_graph.torch, "cuda", double)
    return graph


def test_on_a_cpu_the_call_itself():
    call = torch.zeros
    assert cuda_graph.captured(call, torch.device("cpu")) is call


def test_on_cuda_the_call_is_captured_with_cudnn_and_then_replayed_into_the_same_memory(cuda):
    allowed, output = [], torch.zeros(2)

    def call():
        allowed.append(cudnn_sdp_enabled())
        return output

    with without_cudnn_attention():
        replay = cuda_graph.captured(call, torch.device("cuda"))
        assert not cudnn_sdp_enabled()
    assert allowed == [True] * (cuda_graph.WARM_UP + 1) and cuda.replays == 0
    assert replay() is output and replay() is output
    assert cuda.replays == 2 and len(allowed) == cuda_graph.WARM_UP + 1
