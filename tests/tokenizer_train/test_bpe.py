"""Both trainers give one vocabulary, whatever the text; what they cannot read is read all the same."""

import os
import random
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import ESCAPE, SPLIT_PATTERNS, encode_documents
from tokenizer_train import bpe
from tokenizer_train.bpe import (
    choose_trainer,
    parts_of,
    pieces_of,
    train_tokenizer,
    trained_by_rustbpe,
    trained_by_tokenizers,
)

# few different characters, so that pairs meet often and often tie; and what patterns and engines may see differently
WORDS = [
    "a",
    "b",
    "aa",
    "ab",
    "ba",
    "the",
    "'s",
    "'LL",
    "'ſ",
    "12",
    "123",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "é",
    "漢",
    "😀",
    "!!",
]
TEXTS = st.lists(
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=3)), max_size=30).map("".join), max_size=5
)


def by_both(texts, entries, pattern):
    pieces = [piece for text in texts for piece in pieces_of(text)]
    return trained_by_rustbpe(pieces, entries, pattern), trained_by_tokenizers(pieces, entries, pattern)


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.integers(256, 400), st.sampled_from(list(SPLIT_PATTERNS)))
@example([], 300, "nanochat")
@example(["", "", ""], 300, "gpt2")
@example(["\0\0\0\0"], 300, "nanochat")
@example(["a" * 7 + "b" + "a" * 6], 300, "nanochat")
@example([f"<|{ESCAPE}bos|> x <|{ESCAPE}{ESCAPE}|>"], 300, "cl100k")
def test_both_trainers_merge_the_same(texts, entries, pattern):
    fast, plain = by_both(texts, entries, pattern)
    assert fast == plain


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_every_character_is_counted_alike(pattern):
    """Letters, numbers, blanks and the case folding of contractions, whatever version of Unicode the two have."""
    planes = [
        *range(0xD800),
        *range(0xE000, 0xFDD0),
        *range(0xFDD1, 0x20000),
        *range(0x2FF00, 0x32400),
        *range(0xE0000, 0xE0200),
    ]
    for start in range(0, len(planes), 20_000):
        characters = list(map(chr, planes[start : start + 20_000]))
        texts = [
            "".join(f"{c}1{c}'{c}a'l{c} {c}\n" for c in characters[i : i + 50]) for i in range(0, len(characters), 50)
        ]
        fast, plain = by_both(texts, 1500, pattern)
        assert fast == plain, hex(planes[start])


@pytest.mark.parametrize("trainer", ["rustbpe", "tokenizers"])
def test_half_surrogates_escapes_and_too_little_text(trainer):
    texts = ["a\ud800b", "\ud83d\ude00\ud83d\ude00", f"<|{ESCAPE}bos|>" * 3]
    tokenizer = train_tokenizer(texts, 5000, trainer=trainer)
    same = train_tokenizer(["a\ufffdb", "😀😀", f"<|{ESCAPE}bos|>" * 3], 5000, trainer=trainer)
    assert tokenizer.get_vocab() == same.get_vocab() and 265 < len(tokenizer) < 320
    for text in texts[2:]:
        assert tokenizer.decode(encode_documents(tokenizer, [text])[0][1:]) == text


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_a_long_document_counts_as_a_whole(monkeypatch, pattern):
    """Cut in parts, at the places that are allowed, it has the merges that it has in one piece."""
    choose = random.Random(0).choice
    text = "".join(choose(WORDS) for _ in range(6000))
    whole = trained_by_tokenizers([text], 700, pattern)
    monkeypatch.setattr(bpe, "LONG", 20)
    parts = list(parts_of(text))
    assert "".join(parts) == text and len(parts) > 100
    assert trained_by_tokenizers(parts, 700, pattern) == trained_by_rustbpe(parts, 700, pattern) == whole


@pytest.mark.parametrize(
    "text", [" " * 1_000_000 + "x", "x" + " \n" * 500_000 + "y", "\n" * 1_000_000, "a" * 1_000_000]
)
def test_monotonous_documents_are_read(text):
    """As they are, the first three are more than `rustbpe`'s regular expressions can take."""
    parts = list(parts_of(text))
    assert "".join(parts) == text
    assert len(trained_by_rustbpe(parts, 260, "gpt2")) == 4


def test_without_rustbpe_tokenizers_trains_the_same(monkeypatch):
    texts = ["The cat sat on the mat.", "The hen sat on the hat."] * 5
    fast = train_tokenizer(texts, 290)
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    assert choose_trainer(None) == "tokenizers"
    plain = train_tokenizer(texts, 290)
    assert plain.backend_tokenizer.to_str() == fast.backend_tokenizer.to_str()
    with pytest.raises(UserError, match="rustbpe is not installed"):
        train_tokenizer(texts, 290, trainer="rustbpe")


def test_what_is_unknown_is_told_with_what_is_known():
    with pytest.raises(UserError, match="'gpt5' is unknown; use one of nanochat, ideographs, cl100k, qwen2, gpt2"):
        train_tokenizer(["text"], 300, split_pattern="gpt5")
    with pytest.raises(UserError, match="'spm' is unknown; use one of rustbpe, tokenizers"):
        train_tokenizer(["text"], 300, trainer="spm")


@pytest.mark.parametrize("trainer", ["rustbpe", "tokenizers"])
def test_an_error_while_reading_is_that_error(trainer):
    def texts():
        yield "some text"
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        train_tokenizer(texts(), 300, trainer=trainer)


def test_threads_do_not_matter():
    """Nor does the order in which a process keeps what it has counted."""
    program = (
        "import hashlib, random, sys; from tokenizer_train.bpe import train_tokenizer; r = random.Random(0);"
        "texts = [' '.join(''.join(r.choices('abcde', k=4)) for _ in range(50)) for _ in range(200)];"
        "trained = [train_tokenizer(texts, 500, trainer=trainer) for trainer in ('rustbpe', 'tokenizers')];"
        "print({hashlib.sha256(one.backend_tokenizer.to_str().encode()).hexdigest() for one in trained})"
    )
    settings = [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}]
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | more
        ).stdout
        for more in settings
    }
    assert len(found) == 1 and found.pop().count("'") == 2
