"""Selection of torch's attention kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Allow or disable cuDNN attention on CUDA devices within the block."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN attention on CUDA devices, as a context manager or a decorator.

    torch prefers cuDNN on recent GPUs. It builds a plan, some 30 ms of host time, for each new shape, so at every step
    of a growing cache; and its backward pass can give NaN for fully masked rows, as left padding has (pytorch#196678).
    For training on rows of one length without a mask it is the fastest, so it stays enabled there.

    The switch is torch's and process-wide: set it around all of the process's work, not around single calls.
    """
    with cudnn_attention(False):
        yield
