"""Vocabularies to compare with: GPT-2's and GPT-4's, from files or the network, and any Hugging Face tokenizer.

GPT-2's is read from OpenAI's `encoder.json`, GPT-4's from `cl100k_base.tiktoken`. The given folder and tiktoken's
cache are searched before tiktoken downloads them. Files are identified by sha256, so that no column is mislabelled.
"""

import base64
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.byte_pairs import merges_of
from modeling_nanochat.text.sources import first_line
from modeling_nanochat.tokenization_nanochat import byte_symbols, disable_special_tokens

DOWNLOAD_SECONDS = 8.0  # for 1.5 MB
CHUNK_SIZE = 256  # documents encoded at a time


class MissingVocabulary(Exception):
    """A vocabulary is unavailable; the message says why and what to do."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer to compare with; `count` returns the number of tokens of documents, without special tokens."""

    name: str
    entries: int
    source: str
    count: Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Published:
    """A vocabulary of OpenAI: tiktoken's name for it, its file, its split pattern.

    The patterns are tiktoken's, written so that the regex engine of `tokenizers` gives the same matches.
    """

    name: str
    encoding: str
    entries: int  # special tokens included
    file: str
    sha256: str
    cached_as: str  # in tiktoken's cache
    pattern: str


PUBLISHED = (
    Published(
        name="GPT-2",
        encoding="gpt2",
        entries=50257,
        file="encoder.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        cached_as="6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s",
    ),
    Published(
        name="GPT-4",
        encoding="cl100k_base",
        entries=100277,
        file="cl100k_base.tiktoken",
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        cached_as="9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        pattern=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s++\z|\s*[\r\n]|\s+(?!\S)|\s",
    ),
)


def load_baselines(
    folder: str | None = None, named: Mapping[str, str] | None = None
) -> tuple[list[Vocabulary], dict[str, str]]:
    """Return GPT-2, GPT-4 and the `named` Hugging Face tokenizers, and for each unavailable one the reason.

    Args:
        folder: Contains `encoder.json` and `cl100k_base.tiktoken`, directly or in a subfolder.
        named: Name of the column -> folder or Hub id.

    Raises:
        UserError: `folder` does not exist, or a file in it is not the vocabulary that its name says.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(
            f"vocabularies_dir {folder}: no such folder; give one with encoder.json and cl100k_base.tiktoken"
        )
    loaders = {published.name: lambda p=published: read_published(p, folder) for published in PUBLISHED}
    for name, where in (named or {}).items():
        loaders[name] = lambda name=name, where=where: hugging_face_vocabulary(name, where)
    loaded, missing = [], {}
    for name, load in loaders.items():
        try:
            loaded.append(load())
        except MissingVocabulary as error:
            missing[name] = str(error)
    return loaded, missing


def read_published(published: Published, folder: str | None) -> Vocabulary:
    path = find_file(published, folder)
    if path is None:
        download(published)
        path = find_file(published, folder)
    if path is None:
        raise MissingVocabulary(
            f"downloaded, but tiktoken keeps no cache; set TIKTOKEN_CACHE_DIR, or {help_with(published)}"
        )
    ranks = read_ranks(path.read_bytes(), published)
    return Vocabulary(published.name, published.entries, published.file, counter(ranks, published.pattern))


def find_file(published: Published, folder: str | None) -> Path | None:
    """Return the vocabulary's file in `folder` or in tiktoken's cache, verified by its sha256; None if not found."""
    given = [Path(folder, published.file), *sorted(Path(folder).glob(f"*/{published.file}"))] if folder else []
    for path in given:
        if path.is_file():
            if not has_digest(path, published.sha256):
                raise UserError(f"{path}: not {published.name}'s vocabulary (sha256 differs); replace or remove it")
            return path
    cached = Path(cache_folder(), published.cached_as)
    return cached if cached.is_file() and has_digest(cached, published.sha256) else None


def cache_folder() -> str:
    """Return tiktoken's cache folder."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))


def has_digest(path: Path, sha256: str) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def download(published: Published) -> None:
    """Download the file into tiktoken's cache.

    tiktoken has no timeout, so this waits for a thread, which may keep running until the process ends.
    """
    if is_offline_mode():
        raise MissingVocabulary(f"offline, and it is not in tiktoken's cache; {help_with(published)}")
    try:
        import tiktoken
    except ImportError as error:
        raise MissingVocabulary(
            f"tiktoken would download it; pip install tiktoken, or {help_with(published)}"
        ) from error
    outcome: list[Exception | None] = []

    def fetch() -> None:
        try:
            tiktoken.get_encoding(published.encoding)
            outcome.append(None)
        except Exception as error:  # no network, a bad file, a read-only cache
            outcome.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not outcome:
        raise MissingVocabulary(f"not downloaded within {DOWNLOAD_SECONDS:.0f} s; {help_with(published)}")
    if outcome[0] is not None:
        raise MissingVocabulary(f"could not be downloaded ({type(outcome[0]).__name__}); {help_with(published)}")


def help_with(published: Published) -> str:
    return f"give a --vocabularies_dir with {published.file}"


def read_ranks(content: bytes, published: Published) -> dict[bytes, int]:
    """Return bytes of each token -> its id; ids are also the order of merges. Special tokens are excluded."""
    if published.file.endswith(".tiktoken"):
        lines = (line.split() for line in content.splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in lines}
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocabulary = {token: rank for token, rank in json.loads(content).items() if token != "<|endoftext|>"}
    return {bytes(byte_of[symbol] for symbol in token): rank for token, rank in vocabulary.items()}


def counter(ranks: dict[bytes, int], pattern: str) -> Callable[[Sequence[str]], int]:
    """Return a function that counts tokens, with tiktoken if installed (several times faster), else `tokenizers`."""
    try:
        import tiktoken
    except ImportError:
        return fast_counter(fast_tokenizer(ranks, pattern))
    encoding = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def tokens(document: str) -> int:
        try:
            return len(encoding.encode_to_numpy(document, disallowed_special=()))
        except ValueError:  # its regex engine fails on a megabyte of spaces
            return fast_counter(fast_tokenizer(ranks, pattern))([document])

    return lambda documents: sum(map(tokens, documents))


def fast_counter(tokenizer: Tokenizer) -> Callable[[Sequence[str]], int]:
    def count(documents: Sequence[str]) -> int:
        chunks = (documents[i : i + CHUNK_SIZE] for i in range(0, len(documents), CHUNK_SIZE))
        encoded = (tokenizer.encode_batch_fast(chunk, add_special_tokens=False) for chunk in chunks)
        return sum(len(encoding) for encodings in encoded for encoding in encodings)

    return count


def fast_tokenizer(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    """Return a `tokenizers` tokenizer with the same tokens. Pieces that are tokens are not merged, as in tiktoken."""
    symbols = byte_symbols()
    vocabulary = {"".join(symbols[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges_of(ranks), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def parse_baselines(arguments: Sequence[str]) -> dict[str, str]:
    """Return column name -> folder or Hub id, from `name=where`, or from `where`, whose last part is then the name.

    Raises:
        UserError: Two columns would have the same name.
    """
    taken, named = {"ours", *(published.name for published in PUBLISHED)}, {}
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
    return Vocabulary(name, len(tokenizer), where, fast_counter(backend))
