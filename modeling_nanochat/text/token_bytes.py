"""Bytes of each token: for bits per byte, vocabulary statistics, and text that is not UTF-8."""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..tokenization_nanochat import byte_symbols


def token_spellings(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """Bytes of every token by id; empty for special tokens and unused ids.

    Raises:
        UserError: The tokenizer is not byte-level.
    """
    added, vocabulary = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    spellings = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in added:
            spellings[index] = b"" if added[index].special else token.encode()
        elif byte_of.keys() >= set(token):
            spellings[index] = bytes(byte_of[symbol] for symbol in token)
        else:
            raise UserError(
                f"token {token!r} is not spelled in byte symbols; bytes are counted for byte-level tokenizers only"
            )
    return spellings


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Number of bytes of each token id (V,) int32, 0 for special tokens.

    Counted on the tokens' own bytes: decoded to text, a token that is part of a character would count as three.

    Raises:
        UserError: The tokenizer is not byte-level.
    """
    return np.array([len(spelling) for spelling in token_spellings(tokenizer)], dtype=np.int32)


def decode_bytes(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> bytes:
    """The bytes of `ids`, whether or not they are UTF-8; special tokens have none."""
    spellings = token_spellings(tokenizer)
    return b"".join(spellings[index] for index in ids)


def encode_bytes(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """Ids whose `decode_bytes` is `data`, which need not be UTF-8. It is merged as one piece, without splitting."""
    symbols = byte_symbols()
    return [token.id for token in tokenizer.backend_tokenizer.model.tokenize("".join(symbols[byte] for byte in data))]
