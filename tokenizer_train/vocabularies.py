"""Vocabularies to compare with: GPT-2's and GPT-4's by tiktoken, and any Hugging Face tokenizer."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import is_offline_mode
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line
from modeling_nanochat.tokenization_nanochat import disable_special_tokens
from tokenizer_train.bpe import parts_of

DOWNLOAD_SECONDS = 8.0  # for 1.5 MB
CHUNK_SIZE = 256  # documents encoded at a time
# Column -> tiktoken's name, and the names of its files in tiktoken's cache.
PUBLISHED = {
    "GPT-2": ("gpt2", ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")),
    "GPT-4": ("cl100k_base", ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4",)),
}


class MissingVocabulary(Exception):
    """A vocabulary is unavailable; the message says why and what to do."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer to compare with; `count` returns the number of tokens of documents, without special tokens."""

    name: str
    entries: int
    source: str
    count: Callable[[Sequence[str]], int]


def load_baselines(named: Mapping[str, str] | None = None) -> tuple[list[Vocabulary], dict[str, str]]:
    """Return GPT-2, GPT-4 and the `named` Hugging Face tokenizers, and for each unavailable one the reason.

    Args:
        named: Name of the column -> folder or Hub id.
    """
    loaded, missing = [], {}
    for name, where in (dict.fromkeys(PUBLISHED, "") | dict(named or {})).items():
        try:
            loaded.append(hugging_face_vocabulary(name, where) if where else published_vocabulary(name))
        except MissingVocabulary as error:
            missing[name] = str(error)
    return loaded, missing


def published_vocabulary(name: str) -> Vocabulary:
    """Return a vocabulary of OpenAI from tiktoken's cache or, unless `HF_HUB_OFFLINE` is set, downloaded by it."""
    encoding_name, files = PUBLISHED[name]
    advice = "set TIKTOKEN_CACHE_DIR to a folder that tiktoken has filled"
    try:
        import tiktoken
    except ImportError as error:
        raise MissingVocabulary("it comes with tiktoken; pip install tiktoken") from error
    if is_offline_mode() and not all(Path(cache_folder(), file).is_file() for file in files):
        raise MissingVocabulary(f"offline, and not in tiktoken's cache; {advice}")
    try:
        encoding = within(DOWNLOAD_SECONDS, lambda: tiktoken.get_encoding(encoding_name))
    except Exception as error:  # too slow, no network, a file with another hash, a read-only cache
        raise MissingVocabulary(f"could not be downloaded ({type(error).__name__}); {advice}") from error

    def count(documents: Sequence[str]) -> int:
        # In parts, because tiktoken's regular expressions fail on a megabyte of spaces.
        parts = [part for document in documents for part in parts_of(document)]
        return sum(map(len, encoding.encode_ordinary_batch(parts)))

    return Vocabulary(name, encoding.n_vocab, f"tiktoken {encoding_name}", count)


def cache_folder() -> str:
    """Return tiktoken's cache folder."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return `call()`, or raise `TimeoutError`: tiktoken's download has no timeout. The thread may keep running."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result.result(seconds)


def parse_baselines(arguments: Sequence[str]) -> dict[str, str]:
    """Return column name -> folder or Hub id, from `name=where`, or from `where`, whose last part is then the name.

    Raises:
        UserError: Two columns would have the same name.
    """
    taken, named = {"ours", *PUBLISHED}, {}
    for argument in arguments:
        name, equals, where = argument.partition("=")
        if not equals:
            name, where = Path(argument).name, argument
        if not name or not where or name in taken:
            raise UserError(f"baselines: {argument} needs a unique name in the table; write name={where or 'folder'}")
        taken.add(name)
        named[name] = where
    return named


def hugging_face_vocabulary(name: str, where: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer folder or Hub id. Control tokens in a text are encoded as text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # no such id, no network, broken files, code that would have to be trusted
        raise MissingVocabulary(f"could not be opened ({first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise MissingVocabulary(f"is a {type(tokenizer).__name__}, not a fast tokenizer")
    backend = disable_special_tokens(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))

    def count(documents: Sequence[str]) -> int:
        chunks = (documents[i : i + CHUNK_SIZE] for i in range(0, len(documents), CHUNK_SIZE))
        return sum(len(row) for chunk in chunks for row in backend.encode_batch_fast(chunk, add_special_tokens=False))

    return Vocabulary(name, len(tokenizer), where, count)
