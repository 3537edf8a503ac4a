"""GPU profiles: milliseconds by kind of kernel, and idle time."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from evals.speed.timing import synchronize

# The first pattern that matches a kernel's name determines its kind.
KINDS = (
    ("copies", r"memcpy|memset"),
    ("attention", r"fmha|flash|sdpa|attention|attn|mha_"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitk|_mm_|scaled_mm"),
    ("loss", r"cross_entropy|softcapped|triton.*(tanh|_exp_|_log|scatter|gather|nll|softmax)"),
    ("triton", r"triton"),
    ("aten", r"."),
)
ANNOTATION = re.compile(r"^(Torch-Compiled|CompiledFunction|ProfilerStep|Optimizer\.|##|Memory|Command Buffer)")
Span = tuple[float, float, str]  # start and end in milliseconds, name


def kernel_spans(call: Callable[[], object], device: str) -> list[Span]:
    """Kernels that ran on the device during `call`; operators on a CPU, so that the checks also run there."""
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities):  # the first profile of a process starts slowly
        torch.zeros(1, device=device)
    synchronize(device)
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [e for e in profiler.events() if e.device_type == kind and not ANNOTATION.match(e.name)]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return sorted((e.time_range.start / 1e3, e.time_range.end / 1e3, e.name) for e in events)


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def milliseconds_by_kind(spans: Sequence[Span]) -> dict[str, float]:
    totals = Counter({kind: 0.0 for kind, _ in KINDS})
    for start, end, name in spans:
        totals[kind_of(name)] += end - start
    return {kind: round(total, 3) for kind, total in totals.items()}


def longest(spans: Sequence[Span], kind: str | None = None, count: int = 4) -> dict[str, float]:
    """Milliseconds of the kernels with the largest total, by name."""
    totals = Counter()
    for start, end, name in spans:
        if kind in (None, kind_of(name)):
            totals[name[:120]] += end - start
    return {name: round(total, 3) for name, total in totals.most_common(count)}


def idle_share(spans: Sequence[Span]) -> float:
    """Fraction of the time between the first kernel's start and the last one's end in which no kernel ran."""
    if not spans:
        return 0.0
    busy, reached = 0.0, spans[0][0]
    for start, end, _ in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    return 1 - busy / total if total else 0.0
