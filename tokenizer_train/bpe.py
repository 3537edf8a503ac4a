"""Byte-level BPE training with `tokenizers`: count the pieces of text, then repeatedly merge the most frequent pair.

Ties go to the pair with the smallest ids, as in the original's trainer, so that its merges are the same.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

from tokenizers import models, trainers
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import (
    ESCAPE,
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    SPLIT_PATTERNS,
    build_tokenizer,
    byte_level,
    byte_symbols,
    whole_characters,
)

SplitPattern = Literal["nanochat", "ideographs", "cl100k", "qwen2", "gpt2"]  # the names in `SPLIT_PATTERNS`
LONG = 10_000  # characters
# The end of a word; or white space, letters and digits, or signs, of which there may be too many in a row.
BREAK = re.compile(rf"\S(?= )|\s{{1000,{LONG}}}+|\w{{1000,{LONG}}}+|[^\s\w]{{1000,{LONG}}}+")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    split_pattern: str = "nanochat",
    model_max_length: int = 2048,
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; return a chat tokenizer of `vocab_size` entries, special tokens included.

    It has fewer entries if the text has no more pairs to merge.

    Args:
        texts: Documents; read once and not kept in memory.
        vocab_size: Entries in total, at least 265 (256 bytes and 9 special tokens).
        split_pattern: Name in `SPLIT_PATTERNS`.
        model_max_length: Written into the tokenizer; the context length of the models that will use it.

    Raises:
        UserError: `vocab_size` is too small, or the pattern is unknown.
    """
    check_request(vocab_size, split_pattern)
    pieces = chain.from_iterable(map(pieces_of, texts))
    merges = train_merges(pieces, vocab_size - len(SPECIAL_TOKENS), split_pattern)
    symbols = [*byte_symbols(), *(left + right for left, right in merges)]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return build_tokenizer(vocab, merges, model_max_length, split_pattern)


def check_request(vocab_size: int, split_pattern: str) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} is too small; 256 bytes and 9 special tokens need {SMALLEST_VOCABULARY}"
        )
    if split_pattern not in SPLIT_PATTERNS:
        raise UserError(f"split_pattern {split_pattern!r} is unknown; use one of {', '.join(SPLIT_PATTERNS)}")


def pieces_of(text: str) -> Iterator[str]:
    """Yield `text`, lone surrogates replaced, cut where encoding removes `tokenization_nanochat.ESCAPE`."""
    text, start = whole_characters(text), 0
    while (escape := text.find(f"<|{ESCAPE}", start)) >= 0:
        yield from parts_of(text[start : escape + 2])
        start = escape + 2
    yield from parts_of(text[start:])


def parts_of(text: str) -> Iterator[str]:
    """Yield a long text in parts, so that all threads have work and memory stays small.

    Every pattern splits between a word and the space after it, so the counts do not change. Only a run of over LONG
    characters of one kind counts as several: a merge takes quadratic time in a word's length (half a minute
    for 100,000 times the same letter), and millions of blanks crash the regular expressions.
    """
    start = 0
    while len(text) - start > LONG:
        ends = (found.end() for found in BREAK.finditer(text, start + LONG) if len(found[0]) in (1, LONG))
        end = next(ends, len(text))
        yield text[start:end]
        start = end
    yield text[start:]


def train_merges(texts: Iterable[str], vocab_size: int, split_pattern: str) -> list[tuple[str, str]]:
    """Return the merges, in order, as pairs of symbols; `vocab_size` counts the 256 bytes.

    The byte symbols are passed as special tokens: only then do ids and the order of ties match the original's trainer,
    and bytes that do not occur in training can be encoded.
    """
    tokenizer = byte_level(models.BPE(), split_pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=byte_symbols(),
        initial_alphabet=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
