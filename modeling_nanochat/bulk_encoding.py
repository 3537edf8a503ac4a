"""Encoding whole corpora: the fast tokenizer's ids, several times faster.

Nearly all of the fast tokenizer's time goes into the split pattern. tiktoken splits by the same pattern and merges by
the same ranks in a third of the time; where it is installed and the tokenizer has exactly the structure that
`tokenization_nanochat` builds, it does the work. (gigatoken is faster still, but knows no such pattern.)
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from .tokenization_nanochat import ESCAPE, SPLIT_PATTERN, byte_level, byte_symbols, escaped, whole_characters

if TYPE_CHECKING:
    import tiktoken

MOST_THREADS = 4
WORTH_A_THREAD = 32768  # characters; less text is encoded sooner than threads are started
PLAIN_BPE = {  # what tokenizer.json must say of its model
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}


class BulkEncoder:
    """Ids of many documents, those of `encode_documents` to the last one, as arrays."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, threads: int | None = None):
        self.bos_token_id = tokenizer.bos_token_id
        self.threads = threads or available_threads()
        self.tokenizer = text_only(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        self.encoding = tiktoken_encoding(self.tokenizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        text_only(self.tokenizer)  # a serialised one forgets

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (n,) uint32 of each document, `<|bos|>` in front; control tokens spelled out stay ordinary characters."""
        threads = min(self.threads, len(texts), 1 + sum(map(len, texts)) // WORTH_A_THREAD)
        if threads <= 1:
            return self.encode_share(texts)
        encoded: list = [None] * len(texts)
        with ThreadPoolExecutor(threads) as pool:
            shares = pool.map(self.encode_share, [texts[i::threads] for i in range(threads)])
            for i, share in enumerate(shares):
                encoded[i::threads] = share
        return encoded

    def encode_share(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode_one(whole_characters(text)) for text in texts]

    def encode_one(self, text: str) -> np.ndarray:
        ids = self.text_ids(text)
        document = np.empty(len(ids) + 1, dtype=np.uint32)
        document[0], document[1:] = self.bos_token_id, ids
        return document

    def text_ids(self, text: str) -> Sequence[int]:
        if self.encoding is not None and ESCAPE not in text:
            try:
                return self.encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # a megabyte of spaces is too much for its regular expressions
                pass
        return self.tokenizer.encode(escaped(text, self.tokenizer), add_special_tokens=False).ids


def available_threads() -> int:
    """Cores of this process, shared with the other processes of the machine; no more than tokenization is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def text_only(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, now taking control tokens in text for text, and neither cutting nor padding it."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tiktoken_encoding(tokenizer: Tokenizer) -> "tiktoken.Encoding | None":
    """tiktoken with the same ids, or None where it is not installed or the ids could differ."""
    try:
        import tiktoken
    except ImportError:
        return None
    description = json.loads(tokenizer.to_str())
    if not (splits_alike(description) and merges_alike(tokenizer, description["model"])):
        return None
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    ranks = {bytes(byte_of[symbol] for symbol in token): i for token, i in description["model"]["vocab"].items()}
    return tiktoken.Encoding("same", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def splits_alike(description: dict[str, Any]) -> bool:
    """Whether text is cut by our pattern and nothing else is done to it."""
    ours = json.loads(byte_level(models.BPE()).to_str())["pre_tokenizer"]
    return (
        description["pre_tokenizer"] == ours
        and description["normalizer"] is None
        and (description["post_processor"] or {}).get("type") in (None, "TemplateProcessing")  # adds special tokens only
        and all(token["special"] for token in description["added_tokens"])
        and all(description["model"].get(key) == value for key, value in PLAIN_BPE.items())
    )


def merges_alike(tokenizer: Tokenizer, model: dict[str, Any]) -> bool:
    """Whether merging by rank of the result (tiktoken) is merging by rank of the pair (the fast tokenizer).

    It is where the merges are in order of their results' ids, each makes one token of its own, and every token when
    spelled out is encoded as itself. For then two neighbours that spell a token, none of whose bytes was merged with
    bytes outside, have gone through the same merges as the token alone, so they are the pair of its one merge.
    """
    vocabulary = model["vocab"]
    made = [vocabulary.get(left + right, -1) for left, right in model["merges"]]
    symbols = set(byte_symbols())
    return (
        symbols <= vocabulary.keys()
        and len(vocabulary) == len(symbols) + len(made)
        and -1 not in made
        and all(earlier < later for earlier, later in pairwise(made))
        and all(len(tokenizer.model.tokenize(token)) == 1 for token in vocabulary)
    )
