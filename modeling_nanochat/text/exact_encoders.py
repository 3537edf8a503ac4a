"""gigatoken and tiktoken in place of the fast tokenizer, where their ids are provably identical.

The fast tokenizer spends nearly all of its time in its regular expression. tiktoken has a faster one; gigatoken has
hand-written code for some patterns instead. Both are used only for tokenizers with exactly the structure that
`tokenization_nanochat` builds, and a vocabulary in which merging by rank and merging by pair are equivalent.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ..tokenization_nanochat import SPLIT_PATTERNS, byte_level, byte_symbols

Encode = Callable[[str], np.ndarray]  # text without escapes and `unassigned` characters -> ids (n,) uint32
PLAIN_BPE = {  # required of the model in tokenizer.json
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}
# Our patterns as gigatoken knows them. `\s*[\r\n]+` ends at the last line break of the blanks, as `\s*[\r\n]` does.
# It knows nanochat's only with three digits, which is equivalent if no run of digits is longer than two.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_TO_GIGATOKEN = {
    "nanochat": CL100K,
    "cl100k": CL100K,
    "qwen2": CL100K.replace("{1,3}", ""),
    "gpt2": SPLIT_PATTERNS["gpt2"],
}
# Code points; all others are private or unassigned.
IN_USE = (range(0xD800), range(0xE000, 0x34000), range(0xE0000, 0xE0200))
LOADED_ANEW_AFTER = 2**28  # characters: gigatoken caches every word it has seen, up to 7 bytes per character
PROBE = (
    " It's ſ'ſ WE'LL  a\t\tb \n\n c\r\n\r\n  1 22 333 4444 55555 "
    "٣٣٣٣ ½¾²³ naïve é 漢字かな 한국어 😀👩‍👩‍👧 ... !?\n\n//\x00\u200b\u3000 <|bos|>  "
)


def exact_encoder(tokenizer: Tokenizer, pattern: str | None) -> Encode | None:
    """The installed encoder that is fastest on most text, with the ids of `tokenizer`; None if they could differ.

    `pattern` is its `pattern_name`.
    """
    if pattern is None or not merges_alike(tokenizer):
        return None
    return encoder_by(GigatokenEncoder, tokenizer, pattern) or encoder_by(TiktokenEncoder, tokenizer, pattern)


def encoder_by(
    library: "type[GigatokenEncoder | TiktokenEncoder]", tokenizer: Tokenizer, pattern: str
) -> Encode | None:
    """`library`'s encoder for a tokenizer of our structure; None if its ids differ or it does not support it."""
    try:
        encoder = library(tokenizer, pattern)
        same = encoder(PROBE).tolist() == tokenizer.encode(PROBE, add_special_tokens=False).ids
    except Exception:  # not installed, or a version with other patterns or another interface
        return None
    return encoder if same else None


def pattern_name(tokenizer: Tokenizer) -> str | None:
    """Name of our pattern that splits the text, if nothing else processes it; with or without our escape."""
    description = json.loads(tokenizer.to_str())
    untouched = (
        description["normalizer"] is None
        and (description["post_processor"] or {}).get("type") in (None, "TemplateProcessing")  # only special tokens
        and all(token["special"] for token in description["added_tokens"])
        and all(description["model"].get(key) == value for key, value in PLAIN_BPE.items())
    )
    for name in SPLIT_PATTERNS if untouched else ():
        ours = json.loads(byte_level(models.BPE(), name).to_str())["pre_tokenizer"]
        older = {**ours, "pretokenizers": ours["pretokenizers"][1:]}  # without the escape
        if description["pre_tokenizer"] in (ours, older):
            return name
    return None


def merges_alike(tokenizer: Tokenizer) -> bool:
    """Whether merging by rank of the result (tiktoken) equals merging by rank of the pair (the fast tokenizer).

    It does if the merges are in order of their results' ids, each makes a different token, and every token's spelling
    is encoded as that token. Then two neighbours that spell a token, no byte of which was merged with bytes outside,
    have gone through the same merges as the token alone, so they are the pair of its only merge.
    """
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"]
    results = [vocabulary.get(left + right, -1) for left, right in model["merges"]]
    symbols = set(byte_symbols())
    return (
        symbols <= vocabulary.keys()
        and len(vocabulary) == len(symbols) + len(results)
        and -1 not in results
        and all(earlier < later for earlier, later in pairwise(results))
        and all(len(tokenizer.model.tokenize(token)) == 1 for token in vocabulary)
    )


def unassigned() -> np.ndarray:
    """Code points (0x110000,) bool that are unassigned to the fast tokenizer, or private.

    A library with a newer Unicode takes some for letters or numbers. The escape is among them.
    """
    return characters("Cn", others=True)


class TiktokenEncoder:
    """Encodes with tiktoken. Raises ValueError where its regular expressions give up, as on a megabyte of blanks."""

    def __init__(self, tokenizer: Tokenizer, pattern: str):
        import tiktoken

        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        ranks = {bytes(byte_of[symbol] for symbol in token): index for token, index in vocabulary.items()}
        self.encoding = tiktoken.Encoding(
            "same", pat_str=SPLIT_PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
        )

    def __call__(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=())


class GigatokenEncoder:
    """Encodes with gigatoken, in the calling thread; it is given no special tokens, so it finds none in text."""

    def __init__(self, tokenizer: Tokenizer, pattern: str):
        self.description = gigatoken_description(tokenizer, pattern)
        self.numerals = characters("N", others=False) if pattern == "nanochat" else None
        self.load()

    def load(self) -> None:
        import gigatoken

        self.encoding, self.left = gigatoken.Tokenizer.from_json(self.description), LOADED_ANEW_AFTER

    def __getstate__(self) -> dict[str, Any]:
        return {"description": self.description, "numerals": self.numerals}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.load()

    def __call__(self, text: str) -> np.ndarray:
        self.left -= len(text)
        if self.left < 0:
            self.load()
        cuts = [] if self.numerals is None else second_digits(text, self.numerals)
        if not cuts:
            return self.encoding.encode(text)
        return np.concatenate([self.encoding.encode(text[i:j]) for i, j in pairwise([0, *cuts, len(text)])])


def gigatoken_description(tokenizer: Tokenizer, pattern: str) -> str:
    """tokenizer.json in a form that gigatoken understands; without added tokens, so that their spelling is text."""
    description = json.loads(tokenizer.to_str())
    regex = {"Regex": KNOWN_TO_GIGATOKEN[pattern]}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    byte_level_step = description["pre_tokenizer"]["pretokenizers"][-1]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level_step]}
    return json.dumps(description | {"added_tokens": [], "post_processor": None})


def code_points(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def characters(kind: str, others: bool) -> np.ndarray:
    """Whether the fast tokenizer's regular expressions match each code point as `\\p{kind}`; `others` if not `IN_USE`.

    Returns:
        (0x110000,) bool.
    """
    table = np.full(0x110000, others)
    in_use = np.concatenate(IN_USE)
    split = pre_tokenizers.Split(Regex(rf"\p{{{kind}}}+"), "removed", invert=True)
    found = split.pre_tokenize_str("".join(map(chr, in_use)))
    table[in_use] = False
    for run, _ in found:
        table[code_points(run)] = True
    return table


def second_digits(text: str, numerals: np.ndarray) -> list[int]:
    """Indices at which a run of digits continues after two of them, after four, ...

    nanochat's pattern splits there in any context, because only its `\\p{N}{1,2}` matches digits and nothing in it
    looks behind or past a digit. Split there, no three digits in a row are left for cl100k's pattern.
    """
    digit = numerals[code_points(text)]
    if not (digit[:-2] & digit[1:-1] & digit[2:]).any():
        return []
    index = np.arange(len(digit))
    place = index - np.maximum.accumulate(np.where(digit, 0, index + 1))  # position in its run
    return np.flatnonzero(digit & (place > 0) & (place % 2 == 0)).tolist()
