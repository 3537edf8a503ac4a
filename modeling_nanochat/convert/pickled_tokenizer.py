"""The original's `tokenizer.pkl`, a pickled tiktoken encoder, as a standard fast tokenizer. Needs no tiktoken.

Unpickling may run any code that a file names. This reader allows one name, tiktoken's `Encoding`, and replaces it by a
bare container; any other name is an error. The rest are numbers, strings, bytes and dictionaries.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..text.byte_pairs import merges_of
from ..tokenization_nanochat import SPECIAL_TOKENS, SPLIT_PATTERN, build_tokenizer, byte_symbols

MAX_BYTES = 2**24  # a vocabulary of 262,144 takes 4 MB
MAX_LOOKUPS = 2**26  # in finding the merges: a minute; the square of each token's length at most, 5 million for 65,536


class PickledEncoding:
    """Container for the pickled state of a tiktoken `Encoding`."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class EncodingUnpickler(pickle.Unpickler):
    """Opens a pickled `Encoding` without importing or calling anything."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a tokenizer does not need")
        return PickledEncoding


def load_pickled_tokenizer(path: str | Path, model_max_length: int = 2048) -> PreTrainedTokenizerFast:
    """The fast tokenizer, with chat template, whose ids are those of the encoder pickled in `path`.

    Args:
        path: `tokenizer.pkl` of the original.
        model_max_length: Written into the tokenizer; the context length of its model.

    Raises:
        UserError: Not a pickled encoder, or one whose pattern, special tokens or vocabulary are not the original's.
    """
    try:
        return tokenizer_from_encoding(read_encoding(path), model_max_length)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_encoding(path: str | Path) -> dict[str, Any]:
    """`pat_str`, `mergeable_ranks` and `special_tokens` of the pickled encoder, with their types checked."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); give the folder with the model's tokenizer") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"has more than {MAX_BYTES:,} bytes, so it is no tokenizer; copy or download it again")
    try:
        state = getattr(EncodingUnpickler(io.BytesIO(content)).load(), "state", None)
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        reason = str(error) or type(error).__name__
        raise UserError(f"not a pickled tiktoken encoder: {reason}") from error
    if not isinstance(state, dict):
        raise UserError("not a pickled tiktoken encoder with its own vocabulary; train or give another tokenizer")
    ranks, special = state.get("mergeable_ranks"), state.get("special_tokens")
    if not (is_mapping(ranks, bytes) and is_mapping(special, str) and isinstance(state.get("pat_str"), str)):
        raise UserError("the pickled encoder lacks pat_str, mergeable_ranks or special_tokens")
    return state


def is_mapping(value: Any, kind: type) -> bool:
    """Whether `value` is a dictionary from `kind` to integers."""
    return isinstance(value, dict) and all(isinstance(k, kind) and isinstance(v, int) for k, v in value.items())


def tokenizer_from_encoding(encoding: dict[str, Any], model_max_length: int = 2048) -> PreTrainedTokenizerFast:
    """The fast tokenizer of [`load_pickled_tokenizer`] from the encoder's parts.

    Args:
        encoding: `pat_str` (str), `mergeable_ranks` (bytes -> id) and `special_tokens` (str -> id).
        model_max_length: See [`load_pickled_tokenizer`].

    Raises:
        UserError: A part is not as the original makes it.
    """
    ranks = encoding["mergeable_ranks"]
    if encoding["pat_str"] != SPLIT_PATTERN:
        raise UserError("its split pattern is not nanochat's, so the ids of a text would differ")
    bytes_alone = {token for token in ranks if len(token) < 2}
    if sorted(ranks.values()) != list(range(len(ranks))) or bytes_alone != {bytes([byte]) for byte in range(256)}:
        raise UserError("its vocabulary has gaps, or is not made of single bytes and their merges")
    if sum(len(token) ** 2 for token in ranks) > MAX_LOOKUPS:
        raise UserError("its tokens are too long for merges to be found in bounded time")
    if encoding["special_tokens"] != {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}:
        raise UserError(f"its special tokens are not nanochat's nine, at the end of the {len(ranks)} others")
    symbols = byte_symbols()

    def spelled(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    return build_tokenizer({spelled(token): rank for token, rank in ranks.items()}, merges_of(ranks), model_max_length)
