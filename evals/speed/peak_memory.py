"""The most memory that training a candidate needs, measured in a process of its own: a peak outlives its cause.

A part of `evals/speed/throughput.py`, not a command.
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
    """Bytes in use before the first training step of candidate `name` on ids (B, T), and the most during two steps.

    On a CPU resident memory, on CUDA what torch allocated. A compiled candidate's compiler is loaded before.
    """
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent is the one to end
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=signal.signal, initargs=ignore) as pool:
        return pool.submit(measure, name, setting, ids.cpu()).result()


def measure(name: str, setting: Setting, ids: torch.Tensor) -> tuple[int, int]:
    torch.set_num_threads(setting.threads)
    architecture, way = name.split()
    step = training_step(build_model(architecture, setting), setting, compiled=way == "compiled")
    if way == "compiled":
        torch.compile(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
    ids = ids.to(setting.device)
    before = memory_in_use(setting.device)
    for _ in range(2):
        step(ids)
    return before, memory_peak(setting.device)


def memory_in_use(device: str) -> int:
    """Bytes in use now; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # Linux starts its high-water mark anew, where that is allowed
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def memory_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


def resident_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process; without /proc, as on macOS, the peak for both.

    Linux's `ru_maxrss` would not do: a new process inherits the peak of the one that started it.
    """
    if STATUS.exists():
        return next(int(line.split()[1]) * 2**10 for line in STATUS.read_text().splitlines() if line.startswith(key))
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
