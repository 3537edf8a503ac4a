"""The tokenizer's training text: sources in sequence or mixed by weight, documents truncated, up to a limit."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import is_hub_id
from modeling_nanochat.text.texts import read_texts, text_in_order
from modeling_nanochat.tokenization_nanochat import whole_characters

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass
class Source:
    """A source of documents, and how much of it was read."""

    name: str
    texts: Iterable[str]
    weight: float = 1.0
    expected: float = math.inf  # available characters, if known in advance
    characters: int = 0
    documents: int = 0
    documents_cut: int = 0
    characters_left_out: int = 0  # of the cut documents

    def read(self, doc_cap: int) -> Iterator[str]:
        """Yield the beginning of each document and count it."""
        for text in self.texts:
            beginning = capped(text, doc_cap)
            self.characters += len(beginning)
            self.documents += 1
            self.documents_cut += len(text) > doc_cap
            self.characters_left_out += max(0, len(text) - doc_cap)
            yield beginning


def capped(text: str, doc_cap: int) -> str:
    """Return the first `doc_cap` characters; surrogate pairs are joined before counting, lone ones replaced."""
    return whole_characters(text[: 2 * doc_cap])[:doc_cap]


def open_sources(entries: Sequence[str], weights: Sequence[float] | None, doc_cap: int) -> list[Source]:
    """Return one source per entry; without weights, consecutive local files form one source.

    Raises:
        UserError: The weights do not match the entries, or an entry is missing or not readable as text.
    """
    if weights is not None:
        check_weights(entries, weights)
        return [open_source([entry], doc_cap, weight) for entry, weight in zip(entries, weights, strict=True)]
    kinds = groupby(entries, is_hub_id)
    groups = chain.from_iterable([[entry] for entry in group] if hub else [list(group)] for hub, group in kinds)
    return [open_source(group, doc_cap) for group in groups]


def check_weights(entries: Sequence[str], weights: Sequence[float]) -> None:
    if len(weights) != len(entries):
        found = f"{len(weights)} weights for {len(entries)} entries of train_files"
        raise UserError(f"train_weights: {found}; give one for each")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise UserError(f"train_weights: {wrong[0]} is not a share; give positive numbers, or remove the source")


def open_source(entries: list[str], doc_cap: int, weight: float = 1.0) -> Source:
    dataset, name = text_in_order(entries, what="train_files"), ", ".join(entries)
    return Source(name, read_texts(dataset, name), weight, characters_in(dataset, doc_cap))


def characters_in(dataset: "Dataset | IterableDataset", doc_cap: int) -> float:
    """Return the characters of all documents, truncated; infinite for a stream, which must not be read twice."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return math.inf
    import pyarrow.compute as pc

    texts = dataset.data.column("text")
    return sum(
        pc.sum(pc.min_element_wise(pc.utf8_length(part), doc_cap, skip_nulls=False)).as_py() or 0
        for part in texts.chunks
    )


def one_after_the_other(sources: Sequence[Source], doc_cap: int, max_chars: int) -> Iterator[str]:
    """Yield all documents of each source, until more than `max_chars` characters were read."""
    for text in chain.from_iterable(source.read(doc_cap) for source in sources):
        yield text
        if characters_read(sources) > max_chars:
            return


def by_weight(sources: Sequence[Source], doc_cap: int, max_chars: int) -> Iterator[str]:
    """Yield from the source furthest behind its share, until a source ends or more than `max_chars` were read."""
    readers = [(source, source.read(doc_cap)) for source in sources]
    while characters_read(sources) <= max_chars:
        source, reader = min(readers, key=lambda pair: pair[0].characters / pair[0].weight)
        text = next(reader, None)
        if text is None:
            read = f"{source.characters:,} characters of it, {characters_read(sources):,} in all"
            print(f"{source.name}: no more text; reading ends here to keep the shares, with {read}", flush=True)
            return
        yield text


def characters_read(sources: Iterable[Source]) -> int:
    return sum(source.characters for source in sources)


def expected_characters(sources: Sequence[Source], max_chars: int, weighted: bool) -> float:
    """Return the maximum number of characters that will be read."""
    if not weighted:
        return min(max_chars, sum(source.expected for source in sources))
    total = sum(source.weight for source in sources)
    return min(max_chars, *(source.expected * total / source.weight for source in sources))
