"""Token rows, and the trees that rows with a common beginning form: what they share is computed once.

The options of a question begin with the same tokens, the trunk. A first forward pass puts these, except the last, into
a key-value cache. A second one reads the trunk's last token and then, side by side, what follows in each option: each
token has the position that it has in its own option, and sees the trunk and its own option.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from typing import NamedTuple

LEAST_SAVED = 32  # tokens: about the cost of a second forward pass
TRUNK = -1  # in place of a branch's number


class Row(NamedTuple):
    """A tokenized prompt; tokens from `start` on are scored, so `start` is at least 1."""

    ids: list[int]
    start: int

    @property
    def target(self) -> list[int]:
        return self.ids[self.start :]

    @property
    def fed(self) -> tuple[int, ...]:
        """What the model reads: the last token predicts nothing."""
        return tuple(self.ids[:-1])


@dataclass(frozen=True)
class Tree:
    """Rows by their number, all of which begin with the tokens `trunk`."""

    rows: dict[int, Row]
    trunk: tuple[int, ...]

    @cached_property
    def branches(self) -> list[tuple[int, ...]]:
        """The different continuations of the trunk; only an empty one if the trunk is all that the rows feed."""
        return list(dict.fromkeys(self.branch(row) for row in self.rows.values()))

    def branch(self, row: Row) -> tuple[int, ...]:
        return row.fed[len(self.trunk) :]

    @cached_property
    def is_split(self) -> bool:
        """Whether it takes two passes. A tree that is not split is read in one."""
        return any(self.branches)

    @cached_property
    def size(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def read_first(self) -> tuple[int, ...]:
        return self.trunk[:-1] if self.is_split else ()

    @property
    def read_last(self) -> tuple[int, ...]:
        branches = tuple(token for branch in self.branches for token in branch)
        return self.trunk[len(self.read_first) :] + branches

    @property
    def positions(self) -> list[int]:
        """The position of each token of `read_last` in its own row."""
        end = len(self.trunk)
        return [*range(len(self.read_first), end), *(end + i for branch in self.branches for i in range(len(branch)))]

    @property
    def owners(self) -> list[int]:
        """The number of the branch that each token of `read_last` belongs to, or TRUNK."""
        shared = len(self.trunk) - len(self.read_first)
        return [TRUNK] * shared + [number for number, branch in enumerate(self.branches) for _ in branch]

    def columns(self, row: Row) -> list[int]:
        """Where in `read_last` the scored tokens of a row are predicted, each one place before its own."""
        before = len(self.read_first)
        end = len(self.trunk) - before
        begins = accumulate(map(len, self.branches), initial=end)
        shift = list(begins)[self.branches.index(self.branch(row))] - end
        columns = range(row.start - 1 - before, len(row.ids) - 1 - before)
        return [column if column < end else column + shift for column in columns]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all sequences."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def cropped(ids: list[int], start: int, max_length: int) -> Row:
    """Return the row of a prompt's last `max_length` tokens, scored from its token `start` on."""
    surplus = max(0, len(ids) - max_length)
    return Row(ids[surplus:], max(1, start - surplus))  # nothing predicts the first token


def trees_of(rows: dict[int, Row], share: bool) -> list[Tree]:
    """Return the trees of a question's rows: a single one if that saves enough, else one per different row."""
    by_fed: dict[tuple[int, ...], dict[int, Row]] = {}
    for number, row in rows.items():
        by_fed.setdefault(row.fed, {})[number] = row
    # The trunk's last token is the first that may predict: nothing before it is read together with its logits.
    trunk = min([common_prefix(list(by_fed)), *(row.start for row in rows.values())])
    if share and (len(by_fed) - 1) * (trunk - 1) >= LEAST_SAVED:
        return [Tree(rows, next(iter(by_fed))[:trunk])]
    return [Tree(alike, fed) for fed, alike in by_fed.items()]
