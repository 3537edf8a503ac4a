"""Open a tokenizer that is bounded in time and memory and fits the model: the parts of its files that can make it not.

The fast tokenizer is native code, which can be neither interrupted nor limited: what is in the files decides.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ..errors import UserError, one_line
from ..tokenization_nanochat import (
    ASSISTANT_END,
    BOS,
    ESCAPES,
    PAD,
    PYTHON_END,
    RESPONSE_TEMPLATE,
    SPECIAL_TOKENS,
    SPLIT_PATTERNS,
    has_control_tokens,
)
from .chat_templates import limit_chat_template
from .configuration import errors_only
from .files import check_files, read_json

# A regular expression can take time that grows with the square or exponentially; these are known not to.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {ESCAPES, *SPLIT_PATTERNS.values(), *(CONTRACTIONS + n + REST for n in (r"|\p{N}{1,3}", r"|\p{N}"))}
PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MAX_STEP_CHARACTERS = 20_000  # of each, as JSON
MAX_GROWTH = 64  # of a text by replacements
MAX_TOKEN_CHARACTERS = 10_000
MAX_PADDING = 2**20
MAX_ADDED_TOKENS = 20_000
ENDS = (ASSISTANT_END, PYTHON_END, BOS, PAD)  # what `set_special_tokens` stops generation at
UNSET = ((None, None), (0, 1))  # bos and eos: not set, or the defaults of transformers' class


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer in `folder`, from tokenizer.json whatever class the folder names; errors call it `name`."""
    check_files(folder, name)
    check_tokenizer(folder, name)
    try:
        with errors_only():  # it warns of another class
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer("a")  # some settings of a wrong type fail only here
    except Exception as error:  # of any kind: tokenizers raises bare `Exception`s
        raise UserError(f"{name}: the tokenizer cannot be opened: {one_line(error)}") from error
    limit_chat_template(tokenizer, name)
    if getattr(tokenizer, "response_template", None) is not None:  # regular expressions, which TRL runs on replies
        tokenizer.response_template = RESPONSE_TEMPLATE if has_control_tokens(tokenizer) else None
    return tokenizer


def check_tokenizer(folder: Path, name: str) -> None:
    """Raise [`UserError`] if the tokenizer's files lead elsewhere, or describe one without bounds."""
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = read_json(settings, name)
        names = (key for key, value in content.items() if key.endswith(("_file", "_files", "_object")) and value)
        if key := next((key for key in names if key != "special_tokens_map_file"), None):
            raise UserError(f"{name}: tokenizer_config.json has `{key}`, which leads to another file; remove the key")
        check_added(content.get("added_tokens_decoder"), "tokenizer_config.json", name)
    tokenizer = read_json(folder / "tokenizer.json", name)
    check_added(tokenizer.get("added_tokens"), "tokenizer.json", name)
    try:
        problem = problem_of(tokenizer)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        problem = f"not a tokenizer's ({one_line(error)})"
    if problem:
        raise UserError(f"{name}: tokenizer.json: {problem}; use a tokenizer made for nanochat")


def check_added(tokens: Any, file: str, name: str) -> None:
    if isinstance(tokens, list | dict) and len(tokens) > MAX_ADDED_TOKENS:
        raise UserError(f"{name}: {file} adds {len(tokens):,} tokens, at most {MAX_ADDED_TOKENS:,}; remove some")


def problem_of(tokenizer: dict[str, Any]) -> str | None:
    """What could make a tokenizer.json slow or large, in words; None if nothing."""
    for key in PIPELINE:
        if problem := problem_of_step(tokenizer.get(key)):
            return f"its {key} {problem}"
    if any(number > MAX_PADDING for number in numbers(tokenizer.get("padding"))):
        return f"it pads to more than {MAX_PADDING:,} tokens"
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    entries = vocabulary if isinstance(vocabulary, dict) else [str(entry[0]) for entry in vocabulary]
    if max(map(len, entries), default=0) > MAX_TOKEN_CHARACTERS:
        return f"it has a token of more than {MAX_TOKEN_CHARACTERS:,} characters"
    return None


def problem_of_step(step: Any) -> str | None:
    if len(json.dumps(step)) > MAX_STEP_CHARACTERS:
        return f"has more than {MAX_STEP_CHARACTERS:,} characters"
    parts = list(objects(step))
    patterns = [str(part["Regex"]) for part in parts if "Regex" in part]
    if unknown := next((repr(pattern) for pattern in patterns if pattern not in PATTERNS), None):
        return f"has the regular expression {unknown[:60]}, for which no bound on time is known"
    if any(part.get("String") == "" for part in parts):
        return "searches for an empty text"
    inserted = [str(part[key]) for part in parts for key in ("content", "prepend") if key in part]
    if prod(max(1, len(text)) for text in inserted) > MAX_GROWTH:
        return f"makes texts more than {MAX_GROWTH} times longer"
    return None


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a value of JSON, itself included."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)


def numbers(value: Any) -> Iterator[float]:
    return (n for part in objects(value) for n in part.values() if isinstance(n, int | float))


def check_token_ids(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, name: str) -> None:
    """Raise [`UserError`] for ids beyond the model's vocabulary, or control tokens with other ids than in config.json.

    With control tokens under other ids a model loads and answers, but only nonsense.
    """
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=0)
    if highest >= config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {highest + 1} tokens, the model only {config.vocab_size}; "
            "they are not from the same training, copy the right tokenizer into the folder"
        )
    if any(token not in vocabulary for token in SPECIAL_TOKENS):
        return
    first, ends = getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)
    if (first, ends) in UNSET:
        return
    mine = {vocabulary[token] for token in ENDS}
    listed = set(ends) if isinstance(ends, list) else {ends}
    if first not in (None, vocabulary[BOS]) or not (ends is None or vocabulary[ASSISTANT_END] in listed <= mine):
        raise UserError(
            f"{name}: config.json has bos_token_id {first} and eos_token_id {ends}, but {BOS} is {vocabulary[BOS]} in "
            f"the tokenizer, {ASSISTANT_END} {vocabulary[ASSISTANT_END]}; they are not from the same training, copy "
            "the right tokenizer into the folder"
        )
