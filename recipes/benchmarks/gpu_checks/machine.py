"""Reports the machine, its peak speeds, and the attention kernels that torch chooses on it."""

import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from evals.speed.device_peaks import device_name
from evals.speed.timing import mean_seconds

from . import Report, Setting

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "trl", "datasets", "torchao", "tokenizers")
BACKENDS = ("math", "flash", "efficient", "cudnn", "overrideable")
NVIDIA_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "memory.total")


def check_machine(setting: Setting, report: Report) -> None:
    report.figure("device", device_name(setting.device))
    report.figure("versions", {name: found for name in LIBRARIES if (found := version_of(name))})
    report.figure("cores", torch.get_num_threads())
    if setting.on_gpu:
        report.figure("cuda", torch.version.cuda)
        report.figure("cudnn", torch.backends.cudnn.version())
        report.figure("nvidia_smi", nvidia_smi())
    report.figure("attention_chosen", chosen_kernels(setting))
    matmul_tflops, copy_gbs = ceilings(setting)
    report.figure("matmul_tflops", matmul_tflops)
    report.figure("copy_gb_per_second", copy_gbs)


def version_of(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return dict(zip(NVIDIA_SMI, (cell.strip() for cell in done.stdout.splitlines()[0].split(",")), strict=False))
    return {}


def chosen_kernels(setting: Setting) -> dict[str, str]:
    """torch's choice of kernel for the attention calls of training and decoding."""
    size = 256 if setting.on_gpu else 16
    x = torch.randn(2, 4, size, 64, device=setting.device, dtype=setting.dtype)
    causal = torch.ones(size, size, dtype=torch.bool, device=setting.device).tril()
    padded = causal.expand(2, 1, -1, -1) & (torch.arange(size, device=setting.device) >= size // 4)
    x_grad = x.clone().requires_grad_()
    calls = {
        "causal": (x_grad, x_grad, x_grad, None, 0.0, True),
        "mask": (x_grad, x_grad, x_grad, causal[None, None], 0.0, False),
        "left padded": (x_grad, x_grad, x_grad, padded, 0.0, False),
        "one query": (x[:, :, :1], x, x, None, 0.0, False),
        "one query, mask": (x[:, :, :1], x, x, padded[:, :, -1:], 0.0, False),
    }
    return {name: BACKENDS[torch._fused_sdp_choice(*arguments)] for name, arguments in calls.items()}


def ceilings(setting: Setting) -> tuple[float, float]:
    """Measured TFLOP/s of a large matmul of random numbers, and GB/s of a large copy, counting read and write."""
    side, size = (8192, 2**30) if setting.on_gpu else (128, 2**20)
    left, right = (torch.randn(side, side, device=setting.device, dtype=setting.dtype) for _ in range(2))
    seconds = mean_seconds(lambda: left @ right, setting.device, 10, warm_up=3)
    source = torch.zeros(size, device=setting.device)
    target = torch.empty_like(source)
    copied = mean_seconds(lambda: target.copy_(source), setting.device, 10)
    return 2 * side**3 / seconds / 1e12, 2 * source.nbytes / copied / 1e9
