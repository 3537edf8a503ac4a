"""Encoding whole corpora: the fast tokenizer's ids, many times faster.

gigatoken or tiktoken does the work where it is installed and its ids are provably the same (`exact_encoders`), the fast
tokenizer itself elsewhere. Long documents are cut where nothing of their ids depends on it, so that all threads have
their share of one and its ids take little memory on the way.
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

MOST_THREADS = 4
WORTH_A_THREAD = 32768  # characters; less text is encoded sooner than threads are started
PART = 2**18  # characters of a long document that are encoded at once, up to the next place to cut at

# Where every one of our patterns cuts, whatever stands before and after, so that text may be cut there beforehand:
# - In front of a blank or tab that stands behind no blank. Patterns take one only as the first of a piece or in a run.
# - Behind a line break between two characters that are no blanks. It ends the signs that it follows (`[\r\n]*`) or is
#   taken alone (`\s*[\r\n]`, and `\s+` in GPT-2's); no alternative takes a line break together with what follows.
# Nothing in the patterns looks back, and no escape (`<|` and a noncharacter) has either place inside. What Python calls
# no blank is none to the regular expressions that cut: its blanks are theirs and \x1c-\x1f.
PLACE_TO_CUT = re.compile(r"(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)")


class BulkEncoder:
    """Ids of many documents, those of `encode_documents` to the last one, as arrays."""

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
        disable_special_tokens(self.tokenizer)  # a serialised one forgets

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (n,) uint32 of each document, `<|bos|>` in front; control tokens spelled out stay ordinary characters.

        Half a surrogate pair is read as U+FFFD. A document without a place to cut at, neither blanks nor line breaks between
        words, is encoded as a whole, which takes 25 bytes of memory a character by gigatoken, 50 by tiktoken and up to
        150 by the fast tokenizer, and time that grows somewhat faster than its length, but not with its square.

        Raises:
            UserError: Eight million blanks in a row, where only the fast tokenizer is there to encode them.
        """
        parts = [list(self.parts(whole_characters(text))) for text in texts]
        encoded = iter(self.encode_parts([part for document in parts for part in document]))
        return [self.joined([next(encoded) for _ in document]) for document in parts]

    def parts(self, text: str) -> Iterator[str]:
        """`text` in parts of about `PART` characters whose ids one after the other are its own."""
        start = 0
        while self.may_be_cut and len(text) - start > PART:
            place = PLACE_TO_CUT.search(text, start + PART)
            if place is None:
                break
            yield text[start : place.start()]
            start = place.start()
        yield text[start:]

    def encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        threads = min(self.threads, len(parts), 1 + sum(map(len, parts)) // WORTH_A_THREAD)
        if threads <= 1:
            return [self.text_ids(part) for part in parts]
        encoded: list = [None] * len(parts)
        with ThreadPoolExecutor(threads) as pool:
            shares = pool.map(lambda share: [self.text_ids(part) for part in share], [parts[i::threads] for i in range(threads)])
            for i, share in enumerate(shares):
                encoded[i::threads] = share
        return encoded

    def joined(self, parts: list[np.ndarray]) -> np.ndarray:
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
    """Cores of this process, shared with the other processes of the machine; no more than tokenization is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
