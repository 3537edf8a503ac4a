"""Encoding of large corpora: the fast tokenizer's ids, many times faster.

gigatoken or tiktoken does the work if it is installed and its ids are provably the same (`exact_encoders`), otherwise
the fast tokenizer itself. Long documents are split where that cannot change their ids, so that all threads work on one
document and encoding needs little memory.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..tokenization_nanochat import check_blanks, disable_special_tokens, escaped, whole_characters
from .exact_encoders import code_points, exact_encoder, pattern_name, unassigned

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


class BulkEncoder:
    """Encodes many documents to arrays, with exactly the ids of `encode_documents`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, threads: int | None = None):
        self.bos_token_id = tokenizer.bos_token_id
        self.threads = threads or available_threads()
        self.tokenizer = disable_special_tokens(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        pattern = pattern_name(self.tokenizer)
        self.may_be_cut = pattern is not None
        self.exact = exact_encoder(self.tokenizer, pattern)
        self.unassigned = None if self.exact is None else unassigned()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        disable_special_tokens(self.tokenizer)  # serialisation loses these settings

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (n,) uint32 of each document, starting with `<|bos|>`; control tokens spelled out stay ordinary text.

        Unpaired surrogates are read as U+FFFD. A document without a place to split, neither blanks nor line breaks
        between words, is encoded in one piece. This takes 25 bytes of memory per character with gigatoken, 50 with
        tiktoken and up to 150 with the fast tokenizer, and slightly more than linear but not quadratic time.

        Raises:
            UserError: Eight million blanks in a row, if only the fast tokenizer can encode them.
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
        document[0] = self.bos_token_id
        np.concatenate(parts, out=document[1:])
        return document

    def text_ids(self, text: str) -> np.ndarray:
        if self.exact is not None and (text.isascii() or not self.unassigned[code_points(text)].any()):
            try:
                return self.exact(text)
            except ValueError:  # a megabyte of blanks is too much for tiktoken's regular expressions
                pass
        return self.tokenizers_ids(text)

    def tokenizers_ids(self, text: str) -> np.ndarray:
        check_blanks(text)
        ids = self.tokenizer.encode(escaped(text, self.tokenizer), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)


def available_threads() -> int:
    """This process's cores, divided among the machine's local ranks; at most `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
