"""Rows that cannot be trained on: `on_bad_row` stops at the first one, or leaves them out, counted by reason."""

import re
from dataclasses import dataclass, field
from typing import Literal

from modeling_nanochat.errors import UserError

OnBadRow = Literal["error", "skip"]
MOST_REASONS = 5  # printed


@dataclass(kw_only=True)
class BadRowArguments:
    """What a stage does with a row that it cannot train on."""

    on_bad_row: OnBadRow = field(
        default="error",
        metadata={"help": "A row that cannot be trained on: `error` names it and stops, `skip` counts it."},
    )


class BadRows:
    """Rows of one source that were left out: how many for each reason, and where the first of them is."""

    def __init__(self, on_bad_row: OnBadRow = "error"):
        self.on_bad_row = on_bad_row
        self.reasons: dict[str, list[str]] = {}  # reason -> where, of each row

    def add(self, where: str, error: UserError) -> None:
        """Count a row by its error, which is raised unless bad rows are skipped.

        Args:
            where: The row's file and line; the rows whose errors differ only in it have the same reason.
            error: What is wrong with the row.
        """
        if self.on_bad_row == "error":
            raise error
        self.count(where, re.sub(r"^(, (message|part) \d+)*: ", "", str(error).removeprefix(where)))

    def count(self, where: str, reason: str) -> None:
        """Count a row that is left out in any case."""
        self.reasons.setdefault(reason, []).append(where)

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def summary(self) -> list[str]:
        """A line for each of the most frequent reasons, and one for all others; empty if no row was left out."""
        ranked = sorted(self.reasons.items(), key=lambda item: -len(item[1]))
        lines = [f"left out: {len(rows)} rows, first {rows[0]}: {reason}" for reason, rows in ranked[:MOST_REASONS]]
        others = sum(len(rows) for _, rows in ranked[MOST_REASONS:])
        return lines + ([f"left out: {others} rows for other reasons"] if others else [])
