"""The bulk encoder's ids are the fast tokenizer's, whatever the text, with tiktoken and without."""

import json
import pickle
import sys

import numpy as np
import pytest
from golden import golden_json, golden_tokenizer, shared
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.bulk_encoding import BulkEncoder
from modeling_nanochat.tokenization_nanochat import (
    SPECIAL_TOKENS,
    build_tokenizer,
    byte_symbols,
    encode_documents,
)
from tokenizer_train.bpe import train_tokenizer

# words, so that merges of every rank meet; contractions, numbers and runs of blanks, where the pattern is intricate
WORDS = "the THE cat's it'LL we've don't I'm 1 12 123 4567 naïve Straße ſ ǅ 漢字 かな 한국어 😀 👩‍👩‍👧 é ́ . ,, !? /// {} \x00 \u200b"
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(WORDS.split(" ")),
        st.sampled_from(SPECIAL_TOKENS),
        st.text(st.sampled_from(" \t\n\r\x0b\x0c\x85\xa0\u2028\u3000"), min_size=1, max_size=8),
        st.text(max_size=8),
    ),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    paragraphs = [f"It's the cat's {i}th don't; we'll say naïve 漢字 and  spaces\n\n  of 12{i} kinds. 😀" for i in range(50)]
    return train_tokenizer(paragraphs, 600)


def same_as_tokenizer(encoder, tokenizer, texts):
    encoded = encoder.encode(texts)
    assert all(ids.dtype == np.uint32 for ids in encoded)
    assert [ids.tolist() for ids in encoded] == encode_documents(tokenizer, texts)


@settings(deadline=None, max_examples=150)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example([""])
@example(["<|bos|><|user_start|>"])
@example([" " * 50 + "x" + "\n" * 50])
def test_ids_are_the_tokenizers(tokenizer, texts):
    encoder = BulkEncoder(tokenizer)
    assert encoder.encoding is not None
    same_as_tokenizer(encoder, tokenizer, texts)


def test_every_character_is_split_alike(tokenizer):
    """Whatever version of Unicode the two have: letters, numbers, blanks and the case folding of contractions."""
    encoder = BulkEncoder(tokenizer, threads=1)
    planes = [*range(0xD800), *range(0xE000, 0xFDD0), *range(0xFDD1, 0x20000), *range(0x2FF00, 0x32400), *range(0xE0000, 0xE0200)]
    for start in range(0, len(planes), 5000):
        text = "".join(f"{c}1{c}'{c}a'l{c} {c}\n" for c in map(chr, planes[start : start + 5000]))
        assert encoder.text_ids(text).tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids, hex(planes[start])


def test_golden_texts():
    tokenizer = golden_tokenizer()
    encoder = BulkEncoder(tokenizer)
    assert encoder.encoding is not None
    for case in golden_json("rendering.json")["encode"]:
        assert encoder.encode([case["text"]])[0].tolist()[1:] == case["ids"]


@pytest.mark.parametrize("threads", [1, 3])
def test_real_text_on_several_threads(threads):
    from datasets import load_dataset

    name = str(shared("data/pretrain/textbooks/val.parquet"))
    texts = load_dataset("parquet", data_files=name, split="train")["text"][:40]
    assert sum(map(len, texts)) > 300_000
    tokenizer = train_tokenizer(texts[:10], 3000)
    same_as_tokenizer(BulkEncoder(tokenizer, threads), tokenizer, texts)


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "\n" * 200_000, " " * 200_000 + "x", "1" * 200_000, "漢" * 100_000, "'" * 200_000],
    ids=["one letter", "newlines", "blanks then x", "digits", "one ideograph", "quotes"],
)
def test_monotonous_documents(tokenizer, text):
    encoder = BulkEncoder(tokenizer)
    (ids,) = encoder.encode([text])
    assert ids.tolist() == [tokenizer.bos_token_id, *encoder.tokenizer.encode(text, add_special_tokens=False).ids]


def test_a_document_that_tiktoken_refuses_is_encoded_all_the_same(tokenizer):
    encoder, text = BulkEncoder(tokenizer), " " * 1_000_000
    with pytest.raises(ValueError, match="stack size"):
        encoder.encoding.encode(text)
    same_as_tokenizer(encoder, tokenizer, ["a", text])


def test_half_a_surrogate_pair_is_a_replacement_character(tokenizer, monkeypatch):
    broken, whole = ["a\ud800b", "\udc00", "\ud83d\ude00"], ["a\ufffdb", "\ufffd", "😀"]
    same_as_tokenizer(BulkEncoder(tokenizer), tokenizer, whole)
    expected = [ids.tolist() for ids in BulkEncoder(tokenizer).encode(whole)]
    assert [ids.tolist() for ids in BulkEncoder(tokenizer).encode(broken)] == expected
    assert encode_documents(tokenizer, broken) == expected
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert [ids.tolist() for ids in BulkEncoder(tokenizer).encode(broken)] == expected


def test_no_documents_have_no_ids(tokenizer):
    assert encode_documents(tokenizer, []) == BulkEncoder(tokenizer).encode([]) == []


def test_without_tiktoken_the_tokenizer_itself_encodes(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    encoder = BulkEncoder(tokenizer, threads=2)
    assert encoder.encoding is None
    texts = [f"The cat's {i} <|bos|> " * 3000 for i in range(5)]
    same_as_tokenizer(encoder, tokenizer, texts)
    same_as_tokenizer(pickle.loads(pickle.dumps(encoder)), tokenizer, texts)


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    change(description)
    backend = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", clean_up_tokenization_spaces=False)


def other_pattern(description):
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s?\w+|\W"


def lower_case(description):
    description["normalizer"] = {"type": "Lowercase"}


def swapped_merges(description):
    merges = description["model"]["merges"]
    merges[0], merges[40] = merges[40], merges[0]


def missing_merge(description):
    description["model"]["merges"].pop(20)


def ignored_merges(description):
    description["model"]["ignore_merges"] = True


def ordinary_added_token(description):
    description["added_tokens"][-1]["special"] = False


@pytest.mark.parametrize(
    "change", [other_pattern, lower_case, swapped_merges, missing_merge, ignored_merges, ordinary_added_token]
)
def test_another_structure_is_left_to_the_tokenizer_itself(tokenizer, change):
    other = changed(tokenizer, change)
    encoder = BulkEncoder(other)
    assert encoder.encoding is None
    same_as_tokenizer(encoder, other, ["The CAT's 123 don't <|bos|> <|output_end|>", "we'll  say\n naïve 漢字"])


def test_a_token_reached_by_no_merge_of_its_own_is_left_to_the_tokenizer_itself():
    """`abc` is made of a + bc; tiktoken would also make it of ab + c."""
    symbols = byte_symbols()
    vocab = {symbol: i for i, symbol in enumerate(symbols)} | {"ab": 256, "bc": 257, "abc": 258}
    tokenizer = build_tokenizer(vocab, [("a", "b"), ("b", "c"), ("a", "bc")])
    assert BulkEncoder(tokenizer).encoding is None
    same_as_tokenizer(BulkEncoder(tokenizer), tokenizer, ["abc", "bcabcab"])


def test_the_beginning_is_added_once_where_the_tokenizer_adds_one_itself(tokenizer):
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|bos|>",
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    assert other("cat").input_ids[0] == other.bos_token_id
    same_as_tokenizer(BulkEncoder(other), other, ["The cat", ""])
