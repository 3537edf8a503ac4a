"""Timers that wait for the device: one call, mean and median of several, candidates in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, including the device's work."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(call: Callable[[], object], device: str, repeats: int, warm_up: int = 1) -> float:
    return statistics.median(take_turns({"": call}, device, repeats, warm_up)[1][""])


def mean_seconds(call: Callable[[], object], device: str, repeats: int, warm_up: int = 2) -> float:
    """Return the mean over calls without synchronization in between, for work too short to time individually."""
    for _ in range(warm_up):
        call()
    return seconds_of(lambda: [call() for _ in range(repeats)], device) / repeats


def take_turns(
    calls: Mapping[str, Callable[[], Any]], device: str, repeats: int, warm_up: int = 2
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run all calls in turn, so that disturbances affect all alike; return their results and seconds by name.

    Args:
        repeats: Timed calls of each.
        warm_up: Untimed calls of each before, at least 1, whose last result is returned; the first one may compile.
    """
    returned = {name: [call() for _ in range(warm_up)][-1] for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return returned, seconds
