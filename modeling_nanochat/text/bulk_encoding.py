"""Encoding of large corpora: the fast tokenizer's ids, several times faster.

The fast tokenizer spends nearly all of its time in its regular expression, and tiktoken has a faster engine. tiktoken
does the work if it is installed and its ids are provably the same: for tokenizers with exactly the structure that
`tokenization_nanochat` builds, and a vocabulary in which merging by rank and merging by pair are equivalent. Otherwise
the fast tokenizer itself does. Long documents are split where that cannot change their ids, so that all threads work
on one document and encoding needs little memory.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..tokenization_nanochat import (
    SPLIT_PATTERNS,
    byte_level,
    byte_symbols,
    check_blanks,
    disable_special_tokens,
    document_start,
    escaped,
    whole_characters,
)

if TYPE_CHECKING:  # optional
    import tiktoken

MAX_THREADS = 4
CHARACTERS_PER_THREAD = 32768  # less text is encoded faster than a thread starts
PART = 2**18  # characters of a long document that are encoded at once, up to the next place to split

# Places where each of our patterns splits in any context, so that text may be split there in advance:
# - Before a blank or tab that follows a non-blank. Patterns match a blank only at the start of a piece or in a run.
# - After a line break between two non-blanks. It ends the signs before it (`[\r\n]*`) or is matched alone
#   (`\s*[\r\n]`, and `\s+` in GPT-2's); no alternative matches a line break together with what follows.
# No pattern looks behind, and no escape (`<|` and a noncharacter) contains such a place. Python's non-blanks are also
# non-blanks of the tokenizer's regular expressions: Python's blanks are theirs and \x1c-\x1f.
PLACE_TO_CUT = re.compile(r"(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)")

# What tiktoken needs for the same ids.
PLAIN_BPE = {  # required of the model in tokenizer.json
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}
IN_USE = (range(0xD800), range(0xE000, 0x34000), range(0xE0000, 0xE0200))  # other code points: private or unassigned
PROBE = (  # encoded once by both, in case of another version of tiktoken
    " It's ſ'ſ WE'LL  a\t\tb \n\n c\r\n\r\n  1 22 333 4444 55555 ٣٣٣٣ ½¾²³ naïve é "
    "漢字かな 한국어 😀👩‍👩‍👧 ... !?\n\n//\x00\u200b\u3000 <|bos|>  "
)


class BulkEncoder:
    """Encodes many documents to arrays, with exactly the ids of `encode_documents`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, threads: int | None = None):
        self.start = document_start(tokenizer)
        self.threads = threads or available_threads()
        self.tokenizer = disable_special_tokens(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        pattern = pattern_name(self.tokenizer)
        self.may_be_cut = pattern is not None
        self.tiktoken = tiktoken_encoding(self.tokenizer, pattern)
        self.unassigned = np.empty(0) if self.tiktoken is None else unassigned()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        disable_special_tokens(self.tokenizer)  # serialisation loses these settings

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (n,) uint32 of each document, starting with `<|bos|>`; control tokens spelled out stay ordinary text.

        Unpaired surrogates are read as U+FFFD. A document without a place to split, neither blanks nor line breaks
        between words, is encoded in one piece. This takes 50 bytes of memory per character with tiktoken and up to 150
        with the fast tokenizer, and slightly more than linear but not quadratic time.

        Raises:
            UserError: Eight million blanks in a row.
        """
        parts = [list(self.parts(whole_characters(text))) for text in texts]
        encoded = iter(self.encode_parts([part for document in parts for part in document]))
        return [self.concatenated([next(encoded) for _ in document]) for document in parts]

    def parts(self, text: str) -> Iterator[str]:
        """Split `text` into parts of about `PART` characters whose concatenated ids are those of `text`."""
        start = 0
        while self.may_be_cut and len(text) - start > PART:
            place = PLACE_TO_CUT.search(text, start + PART)
            if place is None:
                break
            yield text[start : place.start()]
            start = place.start()
        yield text[start:]

    def encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        threads = min(self.threads, len(parts), 1 + sum(map(len, parts)) // CHARACTERS_PER_THREAD)
        if threads <= 1:
            return [self.text_ids(part) for part in parts]
        encoded: list = [None] * len(parts)
        with ThreadPoolExecutor(threads) as pool:
            slices = [parts[i::threads] for i in range(threads)]
            for i, ids in enumerate(pool.map(lambda texts: [self.text_ids(text) for text in texts], slices)):
                encoded[i::threads] = ids
        return encoded

    def concatenated(self, parts: list[np.ndarray]) -> np.ndarray:
        document = np.empty(1 + sum(map(len, parts)), dtype=np.uint32)
        document[0] = self.start
        np.concatenate(parts, out=document[1:])
        return document

    def text_ids(self, text: str) -> np.ndarray:
        if self.tiktoken is not None and (text.isascii() or not self.unassigned[code_points(text)].any()):
            try:
                return self.tiktoken.encode_to_numpy(text)
            except ValueError:  # a megabyte of blanks is too much for tiktoken's regular expressions
                pass
        return self.tokenizers_ids(text)

    def tokenizers_ids(self, text: str) -> np.ndarray:
        check_blanks(text)
        ids = self.tokenizer.encode(escaped(text, self.tokenizer), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)


def tiktoken_encoding(tokenizer: Tokenizer, pattern: str | None) -> "tiktoken.Encoding | None":
    """tiktoken's encoder with the ids of `tokenizer`; None if they could differ, or without tiktoken.

    It has no special tokens, so it finds none in text. It raises ValueError where its regular expressions give up.

    Args:
        tokenizer: The fast tokenizer.
        pattern: Its `pattern_name`.
    """
    if pattern is None or not merges_alike(tokenizer):
        return None
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    ranks = {bytes(byte_of[symbol] for symbol in token): index for token, index in vocabulary.items()}
    try:
        import tiktoken

        encoding = tiktoken.Encoding("same", pat_str=SPLIT_PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
        same = encoding.encode_to_numpy(PROBE).tolist() == tokenizer.encode(PROBE, add_special_tokens=False).ids
    except Exception:  # not installed, or a version with another interface
        return None
    return encoding if same else None


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

    tiktoken with a newer Unicode takes some for letters or numbers. The escape is among them.
    """
    table, in_use = np.full(0x110000, True), np.concatenate(IN_USE)
    table[in_use] = False
    split = pre_tokenizers.Split(Regex(r"\p{Cn}+"), "removed", invert=True)  # keeps the matches
    for run, _ in split.pre_tokenize_str("".join(map(chr, in_use))):
        table[code_points(run)] = True
    return table


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def available_threads() -> int:
    """This process's cores, divided among the machine's local ranks; at most `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
