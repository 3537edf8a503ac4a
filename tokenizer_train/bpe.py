"""Byte-level BPE training: count the pieces of text, then repeatedly merge the most frequent pair.

Two libraries give identical merges: the original's `rustbpe`, if installed, because it counts several times faster;
else `tokenizers`. Ties go to the pair with the smallest ids, as in the original.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal, get_args

from tokenizers import models, trainers
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.byte_pairs import merges_of
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

Trainer = Literal["rustbpe", "tokenizers"]
SplitPattern = Literal["nanochat", "ideographs", "cl100k", "qwen2", "gpt2"]  # the names in `SPLIT_PATTERNS`
LONG = 100_000  # characters
BREAK = re.compile(rf"\S(?= )|\s{{1000,{LONG}}}+")  # the end of a word, or white space that may be too long
DOCUMENTS_AT_ONCE = 1024  # held in memory


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    split_pattern: str = "nanochat",
    model_max_length: int = 2048,
    length: int | None = None,
    trainer: Trainer | None = None,
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; return a chat tokenizer of `vocab_size` entries, special tokens included.

    It has fewer entries if the text has no more pairs to merge.

    Args:
        texts: Documents; read once and not kept in memory.
        vocab_size: Entries in total, at least 265 (256 bytes and 9 special tokens).
        split_pattern: Name in `SPLIT_PATTERNS`.
        model_max_length: Written into the tokenizer; the context length of the models that will use it.
        length: Number of documents, for the progress bar of `tokenizers`.
        trainer: Library that trains; None uses `rustbpe` if installed. The result is the same.

    Raises:
        UserError: `vocab_size` is too small, the pattern or trainer is unknown, or the trainer is not installed.
    """
    check_request(vocab_size, split_pattern)
    train = trained_by_rustbpe if choose_trainer(trainer) == "rustbpe" else trained_by_tokenizers
    pieces = chain.from_iterable(map(pieces_of, texts))
    merges = train(pieces, vocab_size - len(SPECIAL_TOKENS), split_pattern, length)
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


def choose_trainer(name: str | None) -> Trainer:
    """Return the trainer of that name; without a name, the fastest one installed."""
    if name not in (None, *get_args(Trainer)):
        raise UserError(f"trainer {name!r} is unknown; use one of {', '.join(get_args(Trainer))}")
    if name == "tokenizers":
        return name
    try:
        import rustbpe  # noqa: F401
    except ImportError as error:
        if name is None:
            return "tokenizers"
        raise UserError("trainer rustbpe is not installed; pip install rustbpe, or omit --trainer") from error
    return "rustbpe"


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
    white-space characters, which `rustbpe` cannot read, counts as several runs.
    """
    start = 0
    while len(text) - start > LONG:
        ends = (found.end() for found in BREAK.finditer(text, start + LONG) if len(found[0]) in (1, LONG))
        end = next(ends, len(text))
        yield text[start:end]
        start = end
    yield text[start:]


def trained_by_tokenizers(
    texts: Iterable[str], vocab_size: int, split_pattern: str, length: int | None = None
) -> list[tuple[str, str]]:
    """Return the merges, in order, as pairs of symbols.

    The byte symbols are passed as special tokens: only then do ids and the order of ties match the original's trainer,
    and bytes that do not occur in training can be encoded.
    """
    tokenizer = byte_level(models.BPE(), split_pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=byte_symbols(),
        initial_alphabet=[],
        show_progress=length is not None,
    )
    tokenizer.train_from_iterator(texts, trainer, length=length)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def trained_by_rustbpe(
    texts: Iterable[str], vocab_size: int, split_pattern: str, length: int | None = None
) -> list[tuple[str, str]]:
    """Return the same from `rustbpe`, which reports only the merged tokens."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, DOCUMENTS_AT_ONCE, SPLIT_PATTERNS[split_pattern])
    return merges_of({bytes(token): index for index, (token, _) in enumerate(tokenizer.get_mergeable_ranks())})
