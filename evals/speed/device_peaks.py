"""The name of a device; peak dense bfloat16 FLOP/s and memory bandwidth by name, from the vendors' data sheets."""

import platform
import re
from pathlib import Path

import torch

# Every word of the first column must be a word of the device's name; the first matching row counts, so variants come
# first. FLOP/s, bytes/s.
PEAKS = (
    ("gb200", 2.5e15, 8.0e12),
    ("b200", 2.25e15, 8.0e12),
    ("b100", 1.8e15, 8.0e12),
    ("h200 nvl", 836e12, 4.8e12),
    ("h200 pcie", 836e12, 4.8e12),
    ("h200", 989e12, 4.8e12),
    ("h100 nvl", 835e12, 3.9e12),
    ("h100 pcie", 756e12, 2.0e12),
    ("h100", 989e12, 3.35e12),
    ("h800 nvl", 989e12, None),
    ("h800", 756e12, None),
    ("a100 40gb", 312e12, 1.555e12),
    ("a100", 312e12, 2.0e12),
    ("a800", 312e12, None),
    ("a40", 149.7e12, 696e9),
    ("a30", 165e12, 933e9),
    ("l40s", 362e12, 864e9),
    ("l4", 121e12, 300e9),
    ("mi355x", 2.5e15, 8.0e12),
    ("mi325x", 1.3074e15, 6.0e12),
    ("mi300x", 1.3074e15, 5.3e12),
    ("mi300a", 980.6e12, 5.3e12),
    ("mi250x", 383e12, 3.28e12),
    ("mi250", 362.1e12, 3.28e12),
    ("5090", 209.5e12, 1.79e12),
    ("4090", 165.2e12, 1.01e12),
    ("3090", 71e12, 936e9),
)
ANOTHER_DEVICE = {"laptop", "max", "d", "ti", "mig"}  # a smaller or larger variant of the same name, or a MIG slice


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def device_peaks(name: str) -> tuple[float | None, float | None]:
    """Return dense bfloat16 FLOP/s and bytes/s of the device called `name`; None if unknown, rather than a guess."""
    words = set(re.findall("[a-z0-9]+", name.lower()))
    for row, flops, bandwidth in PEAKS:
        if words.issuperset(row.split()) and not words & ANOTHER_DEVICE:
            return flops, bandwidth
    return None, None
