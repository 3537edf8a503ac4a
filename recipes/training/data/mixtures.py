"""Mixtures of conversations: sources with their rows and epochs, shuffled together.

As in the original: the rows of a source are permuted by the seed, `rows` takes the first of them, `epochs` repeats
them, and then the rows of all sources, in their order, are shuffled by the seed. Nothing depends on the number of
processes.
"""

import difflib
import json
import math
import random
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import numpy as np

from evals.tasks.gsm8k import Gsm8kQuestion
from evals.tasks.spelling_bee import Generated, SimpleSpelling, SpellingBee, Split, read_words
from evals.tasks.table import FORMATS
from modeling_nanochat.cli import text_table
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import Record, read_records
from modeling_nanochat.text.sources import is_hub_id, load_hub

from ..optim.overrides import check_ranges
from .bad_rows import BadRowArguments, OnBadRow
from .conversations import Renderer, read_conversations
from .packing import Conversation

Reader = Callable[..., list[Any]]  # (records, name, format) -> what each becomes, None if it is left out
GENERATED: dict[str, type[Generated]] = {"spelling_bee": SpellingBee, "simple_spelling": SimpleSpelling}
FIRST_RECORDS = 100  # of each source, checked before anything long begins
HELP = (
    "Instead of train_files, shuffled: names, or mappings (on the command line JSON) of `source` and optionally "
    "`rows`, `epochs`, `format`, `words`."
)


@dataclass(kw_only=True)
class MixtureArguments(BadRowArguments):
    """The conversations of a stage: files as they are, or a mixture."""

    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Conversations, GSM8K, ARC, MMLU: parquet, JSON(L), globs, folders, Hub ids."},
    )
    mixture: list[str] | None = field(default=None, metadata={"help": HELP})  # in YAML also mappings
    max_rows: int | None = field(
        default=None, metadata={"help": "At most so many rows of each source of a mixture, to try it; default: all."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: Both are given, an entry is malformed, or a key has no effect.
        """
        if self.train_files and self.mixture:
            raise UserError("give either train_files or mixture, not both: the mixture can name files too")
        parse_mixture(self.mixture or [], "mixture")
        check_ranges(positive={"max_rows": self.max_rows}, not_negative={}, shares={})
        if self.max_rows and not (self.mixture or getattr(self, "validation_mixture", None)):
            raise UserError("max_rows has no effect without mixture; give one, or leave it out")

    def check_beginnings(self) -> None:
        """Raise [`UserError`] if the first records of a source would be refused, before the model is read."""
        if self.train_files:
            read_conversations(self.train_files, first=FIRST_RECORDS, on_bad_row=self.on_bad_row)
        check_beginnings(parse_mixture(self.mixture or [], "mixture"), FIRST_RECORDS, (), self.on_bad_row)

    def conversations(self, render: Renderer, seed: int) -> list[Conversation]:
        """The rendered conversations: of `train_files` in their order, of a mixture shuffled by the seed.

        Raises:
            UserError: A source or a row is bad, or nothing is left to train on.
        """
        if self.mixture:
            return read_mixture(parse_mixture(self.mixture, "mixture"), render, seed, "mixture", self.max_rows)
        rendered = render(read_records(self.train_files or [], "train_files", arrays_are="messages"), "train_files")
        return kept(rendered, "train_files", render.max_length)


@dataclass(frozen=True)
class Source:
    """One entry of a mixture."""

    source: str  # name of files or a data set, as in train_files; or of a generated task, optionally with `:test`
    rows: int | None = None  # of one epoch; None: all
    epochs: float = 1.0
    format: str | None = None  # where the fields do not tell it
    words: str | None = None  # list of words for a generated task

    @property
    def task(self) -> type[Generated] | None:
        return GENERATED.get(self.source.removesuffix(":test"))

    def check(self, where: str) -> None:
        """Raise [`UserError`] naming the entry if a value is of the wrong type or has no effect."""
        if not isinstance(self.source, str) or not self.source:
            raise UserError(f"{where}: `source` must be the name of files or of a data set")
        where = f"{where} ({self.source})"
        if self.rows is not None and (type(self.rows) is not int or self.rows < 1):
            raise UserError(f"{where}: `rows` must be a whole number from 1 on, or left out, found {self.rows!r}")
        if type(self.epochs) not in (int, float) or not 0 < self.epochs < math.inf:
            raise UserError(f"{where}: `epochs` must be a number above 0, found {self.epochs!r}")
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"{where}: `format` must be one of {', '.join(FORMATS)}, found {self.format!r}")
        if self.task and not (self.rows and isinstance(self.words, str)):
            raise UserError(
                f"{where}: a generated task needs `rows` and `words`, a file or Hub id with a list of words"
            )
        if (self.words is not None and not self.task) or (self.format is not None and self.task):
            raise UserError(f"{where}: `words` is for generated tasks only, and `format` for data sets only")


def parse_mixture(entries: Sequence[Any], what: str) -> list[Source]:
    """Entries of a mixture: mappings, JSON objects as on the command line, or just names.

    Raises:
        UserError: An entry is malformed, or two have the same source; names the entry.
    """
    sources: list[Source] = []
    for number, entry in enumerate(entries, start=1):
        source = parse_entry(entry, f"{what}, entry {number}")
        if source.source in [other.source for other in sources]:
            raise UserError(f"{what}, entry {number}: {source.source} is listed twice; use `epochs` to repeat it")
        sources.append(source)
    return sources


def parse_entry(entry: Any, where: str) -> Source:
    if isinstance(entry, str):
        try:
            entry = json.loads(entry) if entry.startswith("{") else {"source": entry}
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}): {entry}") from error
    keys = [item.name for item in fields(Source)]
    if not isinstance(entry, dict) or "source" not in entry:
        raise UserError(f"{where}: expected a name, or a mapping with `source` and optionally {', '.join(keys[1:])}")
    if unknown := [str(key) for key in entry if key not in keys]:
        close = difflib.get_close_matches(unknown[0], keys, 1)
        meant = f", did you mean {close[0]!r}?" if close else f"; there are {', '.join(keys)}"
        raise UserError(f"{where}: unknown key {unknown[0]!r}{meant}")
    source = Source(**entry)
    source.check(where)
    return source


def check_beginnings(sources: Sequence[Source], first: int, skipped: Container[str], on_bad_row: OnBadRow) -> None:
    """Raise [`UserError`] if the `first` records of a source, or a list of words, show that it would be refused.

    What is in `skipped` does not exist yet.
    """
    for source in sources:
        if source.words and source.words not in skipped:
            read_words(source.words)
        elif not source.task and source.source not in skipped:
            read_conversations([source.source], "mixture", first, source.format, on_bad_row)


def read_mixture(
    mixture: Sequence[Source], render: Renderer, seed: int, what: str, max_rows: int | None = None
) -> list[Conversation]:
    """The rendered conversations in the order of the seed; repeated ones are the same objects. Prints their shares.

    Args:
        max_rows: At most so many rows of one epoch of each source.

    Raises:
        UserError: A source is missing, empty or too short, a row is bad, or nothing is left to train on.
    """
    parts = read_sources(mixture, render, seed, what, max_rows)
    if render.show_progress:
        print(f"{what}:\n{text_table(shares(mixture, parts))}", flush=True)
    return kept(shuffled(parts, seed), what, render.max_length)


def read_sources(
    mixture: Sequence[Source], read: Reader, seed: int, what: str, max_rows: int | None = None
) -> list[list[Any]]:
    """The rows of each source as `read` returns them, in the order of the seed, repeated by its epochs.

    Args:
        max_rows: At most so many rows of one epoch of each source.

    Raises:
        UserError: A source is missing, empty or too short, or a row is bad.
    """
    parts = []
    for number, source in enumerate(mixture, start=1):
        where = f"{what}, entry {number} ({source.source})"
        parts.append(repeated(one_epoch(source, read, seed, where, max_rows), source.epochs, where))
    return parts


def shuffled(parts: Sequence[Sequence[Any]], seed: int) -> list[Any]:
    """All rows in the order of the seed."""
    rows = [row for part in parts for row in part]
    random.Random(seed).shuffle(rows)
    return rows


def one_epoch(source: Source, read: Reader, seed: int, where: str, max_rows: int | None = None) -> list[Any]:
    """The rows of a source in the order of the seed; None for those that are left out."""
    rows = min(filter(None, (source.rows, max_rows)), default=None)
    if source.task:
        return read(generated(replace(source, rows=rows)), source.source)
    if rows is None:
        found = read(read_records([source.source], where, arrays_are="messages"), source.source, source.format)
        return [found[row] for row in np.random.default_rng(seed).permutation(len(found))]
    total = count_rows(source.source, where)
    if total < rows and rows == source.rows:
        raise UserError(f"{where}: has {total:,} rows, not {rows:,}; lower `rows`, or repeat them by `epochs`")
    chosen = np.random.default_rng(seed).permutation(total)[:rows]
    in_order = sorted(chosen)
    found = read(picked(source.source, in_order, where), source.source, source.format)
    return [found[place] for place in np.searchsorted(in_order, chosen)]


def generated(source: Source) -> Iterator[tuple[str, Record]]:
    """The questions of a generated task with their answers, in the original's order."""
    assert source.task and source.words and source.rows, "checked"
    split: Split = "test" if source.source.endswith(":test") else "train"
    for number, question in enumerate(source.task(read_words(source.words), source.rows, split), start=1):
        record: Record = {"messages": question.conversation()}
        if isinstance(question, Gsm8kQuestion):  # in a form that GRPO reads, too
            record = {"question": question.question, "answer": question.worked}
        yield f"{source.source}, question {number}", record


def count_rows(name: str, where: str) -> int:
    if is_hub_id(name):
        return len(load_hub(name))
    return sum(1 for _ in read_records([name], where, arrays_are="messages"))


def picked(name: str, rows: Sequence[int], where: str) -> Iterator[tuple[str, Record]]:
    """The records at `rows`, which are sorted; what follows the last of them is not read."""
    wanted = set(rows)
    records = islice(read_records([name], where, arrays_are="messages"), rows[-1] + 1)
    return (record for row, record in enumerate(records) if row in wanted)


def repeated(rows: list, epochs: float, where: str) -> list:
    """Return exactly round(len(rows) * epochs) rows.

    Raises:
        UserError: That is none.
    """
    if (count := round(len(rows) * epochs)) == 0:
        raise UserError(f"{where}: {epochs:g} epochs of {len(rows)} rows are none; raise `epochs`")
    return (rows * math.ceil(epochs))[:count]


def shares(
    mixture: Sequence[Source],
    parts: Sequence[Sequence[Any]],
    unit: str = "tokens",
    size: Callable[[Any], int] = lambda conversation: len(conversation[0]),
) -> list[list[str]]:
    """Rows of a table: each source's epochs, rows after repetition and those left out, and its share by their size.

    Args:
        parts: The rows of each source; None for those that are left out.
        size: How many `unit` a row has.
    """
    sizes = [sum(size(row) for row in part if row) for part in parts]
    table = [["source", "epochs", "rows", "left out", unit, "share"]]
    for source, part, count in zip(mixture, parts, sizes, strict=True):
        left_out = sum(row is None for row in part)
        cells = [f"{len(part) - left_out:,}", f"{left_out:,}", f"{count:,}", f"{count / max(1, sum(sizes)):.1%}"]
        table.append([source.source, f"{source.epochs:g}", *cells])
    return table


def kept(rendered: Sequence[Conversation | None], what: str, max_length: int) -> list[Conversation]:
    """Return what is not left out.

    Raises:
        UserError: That is nothing.
    """
    conversations = [conversation for conversation in rendered if conversation is not None]
    if not conversations:
        raise UserError(
            f"{what}: none of {len(rendered)} conversations is left: all are bad or have more than "
            f"max_length {max_length} tokens; raise it, or give others"
        )
    return conversations
