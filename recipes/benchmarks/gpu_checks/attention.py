"""Times attention kernels alone: with and without a mask or a window, and the first call at a new length."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from evals.speed.timing import mean_seconds, seconds_of
from modeling_nanochat.attention_kernels import without_cudnn_attention

from . import Report, Setting

WINDOW = 512  # keys before the query
LEAST_TFLOPS = 380.0  # causal, forward and backward
MOST_OF_CAUSAL = 0.6  # time of the window, relative to causal
MOST_MS_OF_NEW_LENGTH = 2.0
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def check_attention(setting: Setting, report: Report) -> None:
    rows, heads, length, width = (32, 10, 2048, 128) if setting.on_gpu else (2, 2, 64, 16)
    shape = (rows, heads, length, width)
    inputs = [torch.randn(shape, device=setting.device, dtype=setting.dtype).requires_grad_() for _ in range(3)]
    causal_flops = 3.5 * 2 * rows * heads * length**2 * width  # backward has five matmuls, forward two
    seconds = {}
    for name, attend in variants(setting, length).items():
        try:
            seconds[name] = time_of(setting, attend, inputs)
        except Exception as error:  # the device or the torch version lacks this kernel
            report.figure(name, f"not available: {(str(error).splitlines() or [type(error).__name__])[0][:160]}")
            continue
        rate = causal_flops / seconds[name] / 1e12
        report.figure(name, {"ms": 1e3 * seconds[name], "causal_tflops": rate})
    check_new_lengths(setting, report)
    if setting.on_gpu:
        causal = min((value for name, value in seconds.items() if name.startswith("causal")), default=float("inf"))
        windowed = min((value for name, value in seconds.items() if name.startswith("window")), default=float("inf"))
        report.at_least("fastest causal kernel, TFLOP/s", causal_flops / causal / 1e12, LEAST_TFLOPS)
        report.at_most("fastest window, time relative to causal", windowed / causal, MOST_OF_CAUSAL)


def time_of(setting: Setting, attend: Callable, inputs: list[torch.Tensor]) -> float:
    """Seconds of forward and backward."""
    gradient = torch.randn_like(inputs[0])

    def call() -> None:
        torch.autograd.grad(attend(*inputs), inputs, gradient)

    return mean_seconds(call, setting.device, 10 if setting.on_gpu else 2)


def variants(setting: Setting, length: int) -> dict[str, Callable]:
    """Functions of queries, keys and values (B, H, T, D), by name."""
    mask = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril()[None, None]

    def causal(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def masked(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(len(query), 1, -1, -1))

    if not setting.on_gpu:
        return {"causal": causal, "dense mask": masked, "window flex": flexible(setting, length)}
    found = {f"causal {name}": on_backend(causal, backend) for name, backend in BACKENDS.items()}
    found |= {f"dense mask {name}": on_backend(masked, BACKENDS[name]) for name in ("cudnn", "efficient")}
    return found | {"window flex": flexible(setting, length)}


def on_backend(attend: Callable, backend: SDPBackend) -> Callable:
    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend(*inputs)

    return call


def flexible(setting: Setting, length: int) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, query, key):
        return (query >= key) & (query - key <= WINDOW)

    blocks = create_block_mask(seen, None, None, length, length, device=setting.device)
    attend = torch.compile(flex_attention, dynamic=False) if setting.on_gpu else masked_reference(length)
    return lambda query, key, value: attend(query, key, value, block_mask=blocks)


def masked_reference(length: int) -> Callable:
    """The same attention with a dense mask, for CPUs, where FlexAttention compiles slowly."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance <= WINDOW)
    return lambda query, key, value, block_mask: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def check_new_lengths(setting: Setting, report: Report) -> None:
    """Time the first call at a new length, for a decoding step and for a prompt."""
    rows, heads, width = (16, 10, 128) if setting.on_gpu else (2, 2, 16)
    first = 320 if setting.on_gpu else 16
    for title, allowed in (("cuDNN allowed", True), ("cuDNN off", False)) if setting.on_gpu else (("any", True),):
        for kind in ("one query", "whole prompt, mask"):
            with nullcontext() if allowed else without_cudnn_attention():
                times = [1e3 * new_length(setting, (rows, heads, first + step, width), kind) for step in range(9)][1:]
            report.figure(f"new length, {kind}, {title}: ms", times)
            if not allowed:
                report.at_most(f"new length, {kind}, {title}: median ms", sorted(times)[4], MOST_MS_OF_NEW_LENGTH)


def new_length(setting: Setting, shape: tuple[int, ...], kind: str) -> float:
    key = torch.randn(shape, device=setting.device, dtype=setting.dtype)
    query = key[:, :, -1:] if kind == "one query" else key
    mask = None
    if kind != "one query":
        mask = torch.ones(shape[2], shape[2], dtype=torch.bool, device=setting.device).tril()
        mask = mask.expand(shape[0], 1, -1, -1)
    return seconds_of(lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask), setting.device)
