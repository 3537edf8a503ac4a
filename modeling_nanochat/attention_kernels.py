"""Which of torch's attention kernels may be used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """In this context, or in a function that it decorates, CUDA devices compute attention without cuDNN.

    torch prefers cuDNN on recent GPUs. It builds a plan, some 30 ms of host time, for each new shape, which is each step
    of a cache that grows; and its backward pass under a mask can give NaN for rows that see nothing, as left padding has
    (pytorch#196678). In training with rows of one length and no mask it is the fastest, so it stays on there.

    The switch is torch's own for the whole process: set it around the process's work rather than around a call of it.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
