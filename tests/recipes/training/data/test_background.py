"""The memory that the trainer and the process that prepares its batches share."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.training.data.background import TOKENS_AHEAD, BackgroundBatches

SHAPES = {"input_ids": (32, 2049), "labels": (32, 2049), "position_ids": (32, 2048)}


def counting():
    """Fills the batches of the other process with 0, 1, 2, ..."""
    numbers = iter(range(1000))

    def fill(batch: dict[str, np.ndarray]) -> None:
        number = next(numbers)
        for rows in batch.values():
            rows[:] = number

    return fill


def bytes_in_shared_memory_files() -> int:
    """What this process maps of /dev/shm."""
    ranges = re.findall(r"^(\w+)-(\w+) .*/dev/shm/", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return sum(int(stop, 16) - int(start, 16) for start, stop in ranges)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_batches_need_nothing_of_dev_shm():
    before = bytes_in_shared_memory_files()
    batches = BackgroundBatches(counting, SHAPES)
    try:
        held = sum(slots.nbytes for slots in batches.slots.values())
        assert held > 2 * 8 * TOKENS_AHEAD  # as much as would fill docker's 64 MiB in five processes
        assert bytes_in_shared_memory_files() - before < 2**16  # a semaphore lies there
        for number in range(2 * batches.depth):
            batch, _ = next(batches)
            assert all(torch.equal(batch[name], torch.full(shape, number)) for name, shape in SHAPES.items())
    finally:
        batches.close()
