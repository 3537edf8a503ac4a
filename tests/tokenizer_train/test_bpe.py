"""The merges are those of the definition, whatever the text; what the regular expressions cannot read is read too."""

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models

from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import ESCAPE, SPLIT_PATTERNS, byte_level, byte_symbols, encode_documents
from tokenizer_train import bpe
from tokenizer_train.bpe import parts_of, pieces_of, train_merges, train_tokenizer

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


def merges_by_definition(pieces, entries, pattern):
    """Merge the most frequent pair, of equally frequent ones that with the smallest ids, and count all anew."""
    split = byte_level(models.BPE(), pattern).pre_tokenizer
    counts = Counter(tuple(word) for piece in pieces for word, _ in split.pre_tokenize_str(piece))
    ids, merges = {symbol: i for i, symbol in enumerate(byte_symbols())}, []
    while len(ids) < entries:
        pairs = Counter()
        for word, count in counts.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        counts = Counter({merged(word, best): count for word, count in counts.items()})
        ids["".join(best)] = len(ids)
        merges.append(best)
    return merges


def merged(word, pair):
    """`word` with every `pair`, from the left, as one symbol."""
    symbols = []
    for symbol in word:
        if not symbols or (symbols[-1], symbol) != pair:
            symbols.append(symbol)
        else:
            symbols[-1:] = ["".join(pair)]
    return tuple(symbols)


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.integers(256, 400), st.sampled_from(list(SPLIT_PATTERNS)))
@example([], 300, "nanochat")
@example(["", "", ""], 300, "gpt2")
@example(["\0\0\0\0"], 300, "nanochat")
@example(["a" * 7 + "b" + "a" * 6], 300, "nanochat")
@example([f"<|{ESCAPE}bos|> x <|{ESCAPE}{ESCAPE}|>"], 300, "cl100k")
def test_the_merges_are_those_of_the_definition(texts, entries, pattern):
    pieces = [piece for text in texts for piece in pieces_of(text)]
    assert train_merges(pieces, entries, pattern) == merges_by_definition(pieces, entries, pattern)


def test_half_surrogates_escapes_and_too_little_text():
    texts = ["a\ud800b", "\ud83d\ude00\ud83d\ude00", f"<|{ESCAPE}bos|>" * 3]
    tokenizer = train_tokenizer(texts, 5000)
    same = train_tokenizer(["a\ufffdb", "😀😀", f"<|{ESCAPE}bos|>" * 3], 5000)
    assert tokenizer.get_vocab() == same.get_vocab() and 265 < len(tokenizer) < 320
    for text in texts[2:]:
        assert tokenizer.decode(encode_documents(tokenizer, [text])[0][1:]) == text


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_a_long_document_counts_as_a_whole(monkeypatch, pattern):
    """Cut in parts, at the places that are allowed, it has the merges that it has in one piece."""
    choose = random.Random(0).choice
    text = "".join(choose(WORDS) for _ in range(6000))
    whole = train_merges([text], 700, pattern)
    monkeypatch.setattr(bpe, "LONG", 20)
    parts = list(parts_of(text))
    assert "".join(parts) == text and len(parts) > 100
    assert train_merges(parts, 700, pattern) == whole


@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000 + "x", "x" + " \n" * 500_000 + "y", "\n" * 1_000_000, "a" * 1_000_000, "'" * 1_000_000],
    ids=["blanks", "blanks and newlines", "newlines", "letters", "quotes"],
)
def test_monotonous_documents_are_read(text):
    parts = list(parts_of(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 2 * bpe.LONG
    assert len(train_merges(parts, 260, "gpt2")) == 4


def test_an_unknown_pattern_is_told_with_the_known_ones():
    with pytest.raises(UserError, match="'gpt5' is unknown; use one of nanochat, ideographs, cl100k, qwen2, gpt2"):
        train_tokenizer(["text"], 300, split_pattern="gpt5")


def test_an_error_while_reading_is_that_error():
    def texts():
        yield "some text"
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        train_tokenizer(texts(), 300)


def test_threads_do_not_matter():
    """Nor does the order in which a process keeps what it has counted."""
    program = (
        "import hashlib, random, sys; from tokenizer_train.bpe import train_tokenizer; r = random.Random(0);"
        "texts = [' '.join(''.join(r.choices('abcde', k=4)) for _ in range(50)) for _ in range(200)];"
        "print(hashlib.sha256(train_tokenizer(texts, 500).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    settings = [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}]
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | more
        ).stdout
        for more in settings
    }
    assert len(found) == 1 and len(found.pop().strip()) == 64
