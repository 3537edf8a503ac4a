"""Stub until the merge."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from ..errors import UserError
from .sources import expand, read_jsonl


def read_records(
    names: Sequence[str], what: str, *, arrays_are: str | None = None, first: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in expand(names, what):
        found = False
        for line, record in islice(read_jsonl(name, arrays_are), first):
            found = True
            yield f"{name}:{line}", record
        if not found:
            raise UserError(f"{what}: {name} is empty; fill it or leave it out")
