"""Peak memory of training a candidate, measured in a new process, because a peak outlives its cause.

Part of `evals/speed/throughput.py`, not a command.
"""

import contextlib
import resource
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .candidates import Setting, build_model, training_step

STATUS = Path("/proc/self/status")


def peak_memory(name: str, setting: Setting, ids: torch.Tensor) -> tuple[int, int]:
    """Return the bytes in use before candidate `name` trains on ids (B, T), and the peak during two steps.

    Resident memory on a CPU, memory allocated by torch on CUDA. A compiled candidate's compiler is loaded before.
    """
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; only the parent handles it
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=signal.signal, initargs=ignore) as pool:
        return pool.submit(measure, name, setting, ids.cpu()).result()


def measure(name: str, setting: Setting, ids: torch.Tensor) -> tuple[int, int]:
    torch.set_num_threads(setting.threads)
    architecture, mode = name.split()
    step = training_step(build_model(architecture, setting), setting, compiled=mode == "compiled")
    if mode == "compiled":
        torch.compile(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()  # loads the compiler
    ids = ids.to(setting.device)
    before = memory_in_use(setting.device)
    for _ in range(2):
        step(ids)
    return before, memory_peak(setting.device)


def memory_in_use(device: str) -> int:
    """Return the bytes in use and reset the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # resets Linux's high-water mark, where permitted
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def memory_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


def resident_bytes(key: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (peak) of this process; without /proc, as on macOS, the peak for both.

    Linux's `ru_maxrss` does not work here: a new process inherits the peak of its parent.
    """
    if STATUS.exists():
        return next(int(line.split()[1]) * 2**10 for line in STATUS.read_text().splitlines() if line.startswith(key))
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
