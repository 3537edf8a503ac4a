"""The checks of `recipes/benchmarks/gpu_check.py`, one module per subject.

A check is a function `check(setting, report)`. It runs in its own process, adds figures and gates to `report` as soon
as they are known, and raises [`Skipped`] if it cannot run. The checks are listed by name, so that `gpu_check.py`
starts without importing any model.
"""

import gc
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
MARK = "@gpu_check "  # prefix of output lines that are messages to gpu_check.py


class Skipped(Exception):
    """Raised if a check cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """The device and options of a check."""

    device: str
    work_dir: str  # an existing folder, shared by all checks of a run
    original: str | None = None
    window_pattern: str | None = None
    rows: int | None = None
    attn_implementation: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32


@dataclass(frozen=True)
class Check:
    """Metadata of a check.

    Attributes:
        function: `module:function` within this package.
        seconds: Duration on an H100 with a cold compile cache; an estimate if it was never measured.
        limit: Time limit in seconds.
        needs: Modules it requires; skipped if one is missing.
        gpu_only: Whether the check cannot run on a CPU.
        prepare: `module:function`s, each of which compiles in its own process a part of what the check will run.
        timed: Whether it measures time or fills the memory, so that nothing else may run concurrently.
    """

    title: str
    function: str
    seconds: int
    limit: int
    needs: tuple[str, ...] = ()
    gpu_only: bool = False
    prepare: tuple[str, ...] = ()
    timed: bool = True

    def load(self) -> Callable:
        return load(self.function)


def load(function: str) -> Callable:
    module, name = function.split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


# In order of execution, untimed checks before all others: the most important first, because a run may be cut short.
CHECKS = {
    "g0": Check("machine", "machine:check_machine", 17, 60),
    "g2": Check("right", "right:check_right", 120, 300, timed=False),
    "g3": Check("train plain", "train:check_plain", 133, 200, prepare=("train:prepare_plain",)),
    "g3_turbo": Check("train turbo", "train:check_turbo", 118, 200, prepare=("train:prepare_turbo",)),
    "g1": Check("attention", "attention:check_attention", 27, 60),
    "g2_documents": Check("packed documents", "right:check_documents", 50, 200, timed=False),
    "g9": Check("SFT and GRPO", "stages:check_trl", 80, 240, ("trl", "datasets", "pydantic_monty"), timed=False),
    "g5": Check(
        "float8", "train:check_float8", 90, 150, needs=("torchao",), gpu_only=True, prepare=("train:prepare_float8",)
    ),
    "g6": Check("FSDP2", "sharded:check_fsdp2", 80, 240, timed=False),
    "g10": Check("decode", "decode:check_decode", 100, 150, prepare=("decode:prepare_row", "decode:prepare_rows")),
    "g13": Check("CORE", "core:check_core", 40, 120),
    "g11": Check("data", "data:check_data", 20, 60, needs=("trl", "datasets")),
    "g7": Check("memory", "memory:check_memory", 120, 200),
    "g8": Check("loop", "stages:check_loop", 60, 120, needs=("trl", "datasets")),
    "g3_whole": Check(
        "train whole d20", "train:check_full_depth", 110, 240, gpu_only=True, prepare=("train:prepare_full_depth",)
    ),
    "g4_current": Check(
        "original, current",
        "original:check_current",
        150,
        240,
        prepare=("original:prepare_current", "original:prepare_turbo"),
    ),
    "g4": Check(
        "original, classic",
        "original:check_original",
        150,
        240,
        prepare=("original:prepare_original", "original:prepare_plain"),
    ),
    "g12": Check("flash attention 3", "train:check_flash_attention", 100, 150, gpu_only=True),
}


@dataclass
class Report:
    """Results of a check so far. Each entry is sent immediately, so that an interrupted check keeps its results."""

    send: Callable[[str, object], None]
    figures: dict[str, object] = field(default_factory=dict)
    gates: list[dict[str, object]] = field(default_factory=list)

    def figure(self, name: str, value: object) -> None:
        value = rounded(value)
        self.figures[name] = value
        self.send("figure", {"name": name, "value": value})

    def gate(self, name: str, value: object, limit: object, passed: bool) -> None:
        gate = {"gate": name, "value": rounded(value), "limit": limit, "passed": bool(passed)}
        self.gates.append(gate)
        self.send("gate", gate)

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.gate(name, value, f">= {limit:g}", value >= limit)

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.gate(name, value, f"<= {limit:g}", value <= limit)

    def holds(self, name: str, passed: bool) -> None:
        self.gate(name, bool(passed), True, passed)


def rounded(value: object) -> object:
    """`value` with all floats, also nested ones, rounded to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def environment(setting: Setting) -> dict[str, str]:
    """Environment of the checks' processes: this checkout importable, no network, no CUDA if device is cpu."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    more = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if not setting.on_gpu:
        more |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        more |= {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}
    return os.environ | more


def free() -> None:
    """Free unreferenced device memory and reset the peak statistics."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
