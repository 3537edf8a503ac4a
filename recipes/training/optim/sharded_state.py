"""Sharded optimizer state: each process saves the rows it owns; any number of processes can read them back.

A shard is the tensor `{parameter}.{state}@{first row}` in the state of a process.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Slot:
    """Rows `rows` of the state `key` of a parameter; `shape` is the full state's."""

    parameter: torch.Tensor
    key: str
    shape: tuple[int, ...]
    rows: range

    @property
    def own_shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.shape[1:]) if self.shape else ()

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.own_shape, dtype=torch.float32, device=self.parameter.device)


class Shard(NamedTuple):
    start: int
    shape: list[int]
    state: safe_open
    tensor: str

    @property
    def stop(self) -> int:
        return self.start + self.shape[0]


def shard_name(state: str, slot: Slot) -> str:
    return f"{state}@{slot.rows.start}"


def read_slots(slots: dict[str, Slot], states: Sequence[safe_open]) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Yield every slot with its rows; nothing else is read.

    Args:
        slots: Keyed by state name, `{parameter}.{state}`.
        states: The opened states of all processes that saved.

    Raises:
        ValueError: A state is missing, incomplete, or of another shape.
    """
    shards = shards_of(states)
    for name, slot in slots.items():
        check(name, slot, shards[name])
        yield slot, concatenated_rows(slot, shards[name])


def shards_of(states: Sequence[safe_open]) -> dict[str, list[Shard]]:
    """All shards by `{parameter}.{state}`, ordered by row."""
    found = defaultdict(list)
    for state in states:
        for tensor in state.keys():
            if match := re.fullmatch(r"(.+)@(\d+)", tensor):
                shape = state.get_slice(tensor).get_shape() or [1]
                found[match[1]].append(Shard(int(match[2]), shape, state, tensor))
    for shards in found.values():
        shards.sort(key=lambda shard: shard.start)
    return found


def check(state: str, slot: Slot, shards: Sequence[Shard]) -> None:
    """Raise `ValueError` unless all rows are there, in the parameter's shape."""
    expected, stop = list(slot.shape or (1,)), 0
    if not shards:
        raise ValueError(f"optimizer state {state} is missing")
    for shard in shards:
        if shard.shape[1:] != expected[1:] or shard.stop > expected[0]:
            raise ValueError(f"optimizer state {shard.tensor} has shape {shard.shape}, the parameter needs {expected}")
        if shard.start > stop:
            break
        stop = max(stop, shard.stop)
    if stop < expected[0]:
        raise ValueError(f"optimizer state {state}: row {stop} of {expected[0]} is missing")


def concatenated_rows(slot: Slot, shards: Sequence[Shard]) -> torch.Tensor:
    """The slot's rows, read from the shards that hold them; a row held twice is read once."""
    if not slot.shape:
        return shards[0].state.get_tensor(shards[0].tensor)
    rows, start = [torch.empty(0, *slot.shape[1:])], slot.rows.start
    for shard in shards:
        stop = min(shard.stop, slot.rows.stop)
        if shard.start <= start < stop:
            rows.append(shard.state.get_slice(shard.tensor)[start - shard.start : stop - shard.start])
            start = stop
    return torch.cat(rows)
