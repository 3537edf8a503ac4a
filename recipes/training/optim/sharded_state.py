"""An optimizer's state in pieces: each process writes the rows it owns, any number of processes reads what it needs.

A piece is the tensor `{parameter}.{state}@{first row}` of a safetensors file.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Slot:
    """Rows `rows` of the state `key` of a parameter; `shape` is that of all its rows."""

    parameter: torch.Tensor
    key: str
    shape: tuple[int, ...]
    rows: range

    @property
    def own_shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.shape[1:]) if self.shape else ()

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.own_shape, dtype=torch.float32, device=self.parameter.device)


class Piece(NamedTuple):
    start: int
    shape: list[int]
    file: Any
    tensor: str

    @property
    def stop(self) -> int:
        return self.start + self.shape[0]


def piece_name(state: str, slot: Slot) -> str:
    return f"{state}@{slot.rows.start}"


def read_slots(slots: dict[str, Slot], files: Sequence[Path]) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Every slot with its rows; of the files only these are read.

    Args:
        slots: By the name of their state, `{parameter}.{state}`.

    Raises:
        ValueError: A state is not there, not all of it, or in another shape.
    """
    with ExitStack() as opened:
        pieces = pieces_of([opened.enter_context(safe_open(path, "pt")) for path in files])
        for state, slot in slots.items():
            check(state, slot, pieces[state])
            yield slot, joined_rows(slot, pieces[state])


def pieces_of(files: Iterable[Any]) -> dict[str, list[Piece]]:
    """All pieces of each state, in the order of their rows."""
    found = defaultdict(list)
    for file in files:
        for tensor in file.keys():
            if match := re.fullmatch(r"(.+)@(\d+)", tensor):
                found[match[1]].append(Piece(int(match[2]), file.get_slice(tensor).get_shape() or [1], file, tensor))
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece.start)
    return found


def check(state: str, slot: Slot, pieces: Sequence[Piece]) -> None:
    """All rows are there, and of the shape that the parameter has."""
    expected, stop = list(slot.shape or (1,)), 0
    if not pieces:
        raise ValueError(f"optimizer state {state} is missing")
    for piece in pieces:
        if piece.shape[1:] != expected[1:] or piece.stop > expected[0]:
            raise ValueError(f"optimizer state {piece.tensor} has shape {piece.shape}, the parameter needs {expected}")
        if piece.start > stop:
            break
        stop = max(stop, piece.stop)
    if stop < expected[0]:
        raise ValueError(f"optimizer state {state}: row {stop} of {expected[0]} is missing")


def joined_rows(slot: Slot, pieces: Sequence[Piece]) -> torch.Tensor:
    """The slot's rows from the pieces that have them; a row that two pieces have is read once."""
    if not slot.shape:
        return pieces[0].file.get_tensor(pieces[0].tensor)
    parts, start = [torch.empty(0, *slot.shape[1:])], slot.rows.start
    for piece in pieces:
        stop = min(piece.stop, slot.rows.stop)
        if piece.start <= start < stop:
            parts.append(piece.file.get_slice(piece.tensor)[start - piece.start : stop - piece.start])
            start = stop
    return torch.cat(parts)
