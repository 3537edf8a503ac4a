"""The tokenizer: split patterns, special tokens, chat template, and building a standard fast tokenizer.

Byte-level BPE. Ids 0-255 are the single bytes in numeric order, then the merges in training order, then the nine
special tokens. A saved folder needs none of this code: `AutoTokenizer.from_pretrained` opens it anywhere.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import UserError

if TYPE_CHECKING:  # it imports torch, which a tokenizer does not need
    from transformers import PreTrainedModel

# How text is split before merging. "nanochat" is GPT-4's pattern with at most two digits per token: small vocabularies
# waste fewer entries on numbers. "ideographs" also splits off each Chinese character, as BERT does: without spaces
# between words, a small vocabulary fills up with fragments of sentences. The others are cl100k_base's, Qwen2's and
# GPT-2's. All are written so that every regex engine reads them alike.
SPLIT_PATTERNS = {
    "nanochat": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+"
        r"|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "ideographs": (
        r"[㐀-鿿]|'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+(?:(?![㐀-鿿])\p{L})+"
        r"|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+"
        r"|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
SPLIT_PATTERN = SPLIT_PATTERNS["nanochat"]
BOS, ASSISTANT_END, PYTHON_END = "<|bos|>", "<|assistant_end|>", "<|python_end|>"
# Padding: a token that no model writes or is trained on, so masking its label or attention never removes content.
PAD = "<|output_start|>"
SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    ASSISTANT_END,
    "<|python_start|>",
    PYTHON_END,
    "<|output_start|>",
    "<|output_end|>",
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# The chat template escapes a control token spelled out in a message by inserting a Unicode noncharacter, reserved for
# internal use, after its `<|`. The pre-tokenizer removes it again: the text is the same to the byte, but no longer the
# token. Where the text itself has the noncharacter after `<|`, the template inserts another one.
ESCAPE = "\ufdd0"
PART_END = f"<|{ESCAPE}|>"  # between two text parts of a message, which are encoded separately
ESCAPES = rf"<\|{ESCAPE}\|>|(?<=<\|){ESCAPE}"
TO_ESCAPE = rf"<\|(?={ESCAPE}|(?:{'|'.join(token[2:-2] for token in SPECIAL_TOKENS)})\|>)"

TOO_MANY_BLANKS = 8_000_000  # in a row: the fast tokenizer looks for a line break after each; ten million crash it

# How `parse_response` and TRL's tool loop read the model's output, in agreement with the engine. The anchor matches
# both places where an answer can begin: the start of the assistant's turn, the end of a tool's output. Only a closed
# call with code is a call; an unclosed one is not text either. Everything after the end of the turn is padding.
CONTROL = rf"<\|(?:{'|'.join(token[2:-2] for token in SPECIAL_TOKENS)})\|>"
IN_CALL = r"(?:(?!<\|python_(?:start|end)\|>).)"  # a second start restarts the call
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"(?:<\|assistant_start\|>|<\|output_end\|>)",
    "fields": {
        "tool_calls": {
            "open_pattern": rf"<\|python_start\|>(?P<code>{IN_CALL}+)<\|python_end\|>",
            "close_pattern": "",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "python", "arguments": {"code": "{code}"}}},
        },
        "ignored": {
            "open_pattern": rf"<\|(?:assistant_end|bos)\|>.*|<\|python_start\|>{IN_CALL}*|{CONTROL}",
            "close_pattern": "",
            "content": "text",
            "transform": "",  # empty fields are not part of the message
        },
        "content": {"repeats": True, "join": "", "content": "text", "content_args": {"strip": False}},
    },
}


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE uses for each byte, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def byte_level(model: models.BPE, split_pattern: str = "nanochat") -> Tokenizer:
    """A byte-level `Tokenizer` around `model` that splits text by the named pattern."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ESCAPES), behavior="removed"),
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split_pattern]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_tokenizer(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    model_max_length: int = 2048,
    split_pattern: str = "nanochat",
) -> PreTrainedTokenizerFast:
    """A standard fast tokenizer with chat template, from a byte-level vocabulary (symbol -> id) and its merges.

    Plain text begins with `<|bos|>`, as every training document does, so that a base model continues it well; rows are
    padded on the left, so that a generated reply does not follow padding.
    """
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=list(merges)), split_pattern)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=ASSISTANT_END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        add_bos_token=True,
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8"),
        response_template=RESPONSE_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer's files into `folder`, with the chat template where each library looks for it.

    That is `chat_template.jinja` for transformers, which would write only that, and the key `chat_template` of
    `tokenizer_config.json` for most others (transformers.js, servers in Rust and C++).
    """
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    tokenizer.save_chat_templates(folder, {}, filename_prefix=None, save_jinja_files=True)


def has_control_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has the nine control tokens, as this project's have."""
    return tokenizer.get_vocab().keys() >= set(SPECIAL_TOKENS)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Name -> id of the nine control tokens.

    Raises:
        UserError: One is missing, so it is not a nanochat tokenizer.
    """
    vocab = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"the tokenizer has no {missing[0]} token; use one made for nanochat")
    return {token: vocab[token] for token in SPECIAL_TOKENS}


def set_special_tokens(model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the tokenizer's special ids into the model's configuration and generation configuration.

    Generation stops at the end of a turn, of a call (the caller then runs the tool) and of a document. It also stops
    at padding, because transformers then does not treat that id as padding in a prompt without a mask.
    """
    ids = special_token_ids(tokenizer)
    padding = ids[PAD] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        config.bos_token_id = ids[BOS]
        config.eos_token_id = [ids[token] for token in (ASSISTANT_END, PYTHON_END, BOS, PAD)]
    model.generation_config.pad_token_id = padding
    model.config.pad_token_id = None  # its embedding would never be trained


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that a document begins with: bos; eos, which separates documents, where a tokenizer has no bos.

    Raises:
        UserError: It has neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        where = tokenizer.name_or_path or "this tokenizer"
        raise UserError(f"{where}: has neither a bos nor an eos token to begin a document with; set `bos_token`")
    return cast("int", start)


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each document, starting with `document_start`; control tokens spelled out stay ordinary text.

    Unpaired surrogates, which the tokenizer refuses, are read as U+FFFD. For much text, or documents of megabytes, see
    `bulk_encoding`.

    Raises:
        UserError: Eight million blanks in a row.
    """
    if not texts:
        return []
    texts = [escaped(whole_characters(text), tokenizer.backend_tokenizer) for text in texts]
    for text in texts:
        check_blanks(text)
    # The flag is tokenizer state, and other threads may be using it: set only where escapes are not enough.
    split = not escapes_all(tokenizer.backend_tokenizer)
    # not verbose: a document may be longer than the context, because it is packed into rows
    encoded = tokenizer(texts, split_special_tokens=split, add_special_tokens=False, verbose=False)["input_ids"]
    start = document_start(tokenizer)
    return [[start, *ids] for ids in encoded]


def escaped(text: str, tokenizer: Tokenizer) -> str:
    """`text` as input for a tokenizer that removes `ESCAPES`: without control tokens, and losing no characters."""
    if "<|" in text and removes_escapes(tokenizer):
        return re.sub(TO_ESCAPE, f"<|{ESCAPE}", text)
    return text


def escapes_all(tokenizer: Tokenizer) -> bool:
    """Whether `escaped` text contains none of this tokenizer's control tokens."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return special <= set(SPECIAL_TOKENS) and removes_escapes(tokenizer)


def removes_escapes(tokenizer: Tokenizer) -> bool:
    cut = tokenizer.pre_tokenizer
    return cut is not None and [piece for piece, _ in cut.pre_tokenize_str(f"{PART_END}<|{ESCAPE}")] == ["<|"]


def disable_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, changed to encode control tokens in text as plain text, without truncation or padding."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_blanks(text: str) -> None:
    """Raise [`UserError`] for more blanks in a row than the fast tokenizer's regular expressions can handle."""
    runs = re.finditer(r"[^\S\r\n]+", text) if len(text) >= TOO_MANY_BLANKS else ()
    if any(len(run[0]) >= TOO_MANY_BLANKS for run in runs):
        raise UserError(f"a document has {TOO_MANY_BLANKS:,} blanks in a row; leave it out")


def whole_characters(text: str) -> str:
    """`text` with surrogate pairs joined and unpaired surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def whole_messages(value: Any) -> Any:
    """Messages or tools, with `whole_characters` applied to every text: JSON can contain unpaired surrogates."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, dict):
        return {whole_messages(key): whole_messages(item) for key, item in value.items()}
    return [whole_messages(item) for item in value] if isinstance(value, list | tuple) else value
