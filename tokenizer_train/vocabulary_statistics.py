"""Vocabulary statistics: length and kind of the tokens, how many a text uses, and which cannot be reached."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.text.bulk_encoding import BulkEncoder
from modeling_nanochat.text.token_bytes import encode_bytes, token_spellings

EXAMPLES = 12
KINDS = (
    "single bytes",
    "space and letters",  # the beginnings of words, and words
    "letters",
    "digits",
    "punctuation and symbols",
    "white space",
    "letters and other signs",
    "beyond ASCII",
    "part of a character",  # not valid UTF-8 alone
)


def vocabulary_statistics(
    tokenizer: PreTrainedTokenizerFast, counts: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Return statistics of the tokens; those about bytes exclude special tokens.

    Args:
        tokenizer: A byte-level tokenizer.
        counts: Text -> number of occurrences of each token id in it (V,).

    Raises:
        UserError: The tokenizer is not byte-level.
    """
    spellings = token_spellings(tokenizer)
    tokens = [spelling for spelling in spellings if spelling]
    lengths = [len(spelling) for spelling in tokens]
    kinds = Counter(kind_of(spelling) for spelling in tokens)
    unreachable = unreachable_tokens(tokenizer, spellings)
    return {
        "entries": len(tokenizer),
        "special_tokens": len(tokenizer) - len(tokens),
        "token_bytes": {
            "min": min(lengths),
            "max": max(lengths),
            "mean": round(statistics.mean(lengths), 3),
            "std": round(statistics.stdev(lengths), 3),
        },
        "kinds": {kind: kinds[kind] for kind in KINDS},
        "longest": [readable(token) for token in sorted(tokens, key=len, reverse=True)[:EXAMPLES]],
        "unreachable": {
            "tokens": len(unreachable),
            "examples": [readable(spellings[index]) for index in unreachable[:EXAMPLES]],
        },
        "used": {name: int(np.count_nonzero(count)) for name, count in (counts or {}).items()},
    }


def kind_of(spelling: bytes) -> str:
    """Return the kind of a token, one of `KINDS`."""
    if len(spelling) == 1:
        return "single bytes"
    try:
        text = spelling.decode()
    except UnicodeDecodeError:
        return "part of a character"
    body = text.removeprefix(" ")
    if not text.isascii():
        return "beyond ASCII"
    if text.isspace():
        return "white space"
    if body.isalpha():
        return "letters" if body == text else "space and letters"
    if body.isdigit():
        return "digits"
    return "letters and other signs" if any(map(str.isalnum, text)) else "punctuation and symbols"


def unreachable_tokens(tokenizer: PreTrainedTokenizerFast, spellings: Sequence[bytes]) -> list[int]:
    """Return ids that encoding their own bytes does not produce: the split pattern or earlier merges prevent it.

    Tokens that are not valid UTF-8 alone are only merged, not split.
    """
    texts = {index: text for index, spelling in enumerate(spellings) if (text := decoded(spelling))}
    encoded = BulkEncoder(tokenizer).encode(list(texts.values()))
    found = {index: ids[1:].tolist() for index, ids in zip(texts, encoded, strict=True)}  # without <|bos|>
    parts = [index for index, spelling in enumerate(spellings) if spelling and index not in texts]
    found |= {index: encode_bytes(tokenizer, spellings[index]) for index in parts}
    return sorted(index for index, ids in found.items() if ids != [index])


def decoded(spelling: bytes) -> str:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return ""


def readable(spelling: bytes) -> str:
    """Return the token's text, with invalid bytes as `\\xe2`."""
    return spelling.decode(errors="backslashreplace")
