"""The bulk encoder's ids are the fast tokenizer's, whatever the text, with tiktoken and without."""

import json
import pickle
import sys
from unittest.mock import patch

import numpy as np
import pytest
import tiktoken
from golden import golden_json, golden_tokenizer, shared
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_nanochat import tokenization_nanochat
from modeling_nanochat.errors import UserError
from modeling_nanochat.text import bulk_encoding
from modeling_nanochat.text.bulk_encoding import PLACE_TO_CUT, BulkEncoder
from modeling_nanochat.text.token_bytes import decode_bytes, encode_bytes
from modeling_nanochat.tokenization_nanochat import (
    ESCAPE,
    PART_END,
    SPECIAL_TOKENS,
    SPLIT_PATTERNS,
    build_tokenizer,
    byte_symbols,
    encode_documents,
    whole_characters,
)
from tokenizer_train.bpe import train_tokenizer

LIBRARIES = ("tiktoken", "tokenizers")
# words, so that merges of every rank meet; contractions, numbers and runs of blanks, where the pattern is intricate
WORDS = (
    "the THE cat's it'LL we've don't I'm 1 12 123 4567 "
    "١٢٣٤ 1½²³ naïve Straße ſ ǅ 漢字 かな 한국어 😀 👩‍👩‍👧 é ́ . ,, !? /// {} \x00 \u200b"
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(WORDS.split(" ")),
        st.sampled_from([*SPECIAL_TOKENS, "<|endoftext|>"]),
        st.sampled_from([ESCAPE, f"<|{ESCAPE}", f"<|{ESCAPE}bos|>", f"<|{ESCAPE}{ESCAPE}", PART_END]),
        st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000"), min_size=1, max_size=8),
        st.text(st.sampled_from("a'sl1.\n "), min_size=1, max_size=12),
        st.text(max_size=8),
    ),
    max_size=20,
).map("".join)
PARAGRAPH = "It's the cat's {}th don't; we'll say naïve 漢字 and  spaces\n\n  of 12{} kinds. 😀\r\n\t1½² ١٢٣"


@pytest.fixture(scope="module")
def tokenizers():
    paragraphs = [PARAGRAPH.format(i, i) for i in range(50)]
    return {name: train_tokenizer(paragraphs, 600, split_pattern=name) for name in SPLIT_PATTERNS}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["nanochat"]


@pytest.fixture(scope="module")
def encoders(tokenizers):
    return {(name, library): encoder_by(library, tokenizers[name]) for name in SPLIT_PATTERNS for library in LIBRARIES}


def encoder_by(library, tokenizer, threads=None):
    """An encoder that works by this library."""
    with pytest.MonkeyPatch.context() as without:
        if library == "tokenizers":
            without.setitem(sys.modules, "tiktoken", None)
        encoder = BulkEncoder(tokenizer, threads)
    assert (encoder.tiktoken is not None) == (library == "tiktoken")
    return encoder


def same_as_tokenizer(encoder, tokenizer, texts):
    encoded = encoder.encode(texts)
    assert all(ids.dtype == np.uint32 for ids in encoded)
    assert [ids.tolist() for ids in encoded] == encode_documents(tokenizer, texts)


every_pattern = pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
every_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.mark.slow
@every_pattern
@every_library
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=[""])
@example(texts=["<|bos|><|user_start|>"])
@example(texts=[" " * 50 + "x" + "\n" * 50, "1" * 50, "a\n" + "\n" * 50 + " \n x"])
def test_ids_are_the_tokenizers_and_spell_the_text(tokenizers, encoders, pattern, library, texts):
    tokenizer, encoder = tokenizers[pattern], encoders[pattern, library]
    same_as_tokenizer(encoder, tokenizer, texts)
    assert [tokenizer.decode(ids[1:]) for ids in encoder.encode(texts)] == [whole_characters(text) for text in texts]


@every_pattern
@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
@example(text="it's a\nb'l l\nit'l\n.\na\r\nb a\n\n b a \n")
def test_a_document_cut_at_every_possible_place_has_its_ids(encoders, pattern, text):
    encoder, text = encoders[pattern, "tokenizers"], whole_characters(text)
    whole = encoder.text_ids(text).tolist()
    with patch.object(bulk_encoding, "PART", 1):
        parts = list(encoder.parts(text))
        (encoded,) = encoder.encode([text])
    assert "".join(parts) == text
    assert encoded.tolist()[1:] == whole


def telling_tokenizer(pattern):
    """Its ids tell letters, numbers, blanks and signs apart, as each kind is in one piece with others of these."""
    bytes_ = byte_symbols()
    pairs = [(left, lead) for left in ("a", "1", bytes_[ord(" ")]) for lead in bytes_[0xC2:0xF5]]
    pairs += [(last, right) for last in bytes_[0x80:0xC0] for right in ("a", "1", ".", bytes_[ord("\n")])]
    vocab = {symbol: i for i, symbol in enumerate([*bytes_, *("".join(pair) for pair in pairs)])}
    return build_tokenizer(vocab, pairs, split_pattern=pattern)


@pytest.mark.slow
@every_pattern
def test_every_character_is_split_alike(pattern):
    """Whatever versions of Unicode the libraries have; and what is no character yet goes to the tokenizer itself."""
    tokenizer = telling_tokenizer(pattern)
    ours, theirs = encoder_by("tokenizers", tokenizer), encoder_by("tiktoken", tokenizer).tiktoken
    assigned = np.flatnonzero(~bulk_encoding.unassigned())
    assert 155_000 < len(assigned) < 170_000
    known = [chr(point) for point in assigned if not 0xD800 <= point < 0xE000]
    for start in range(0, len(known), 5000):
        text = "".join(f"{c}. {c}1{c}\na'{c}a{c}" for c in known[start : start + 5000])
        assert theirs.encode_to_numpy(text).tolist() == ours.text_ids(text).tolist(), hex(ord(known[start]))
        text = "".join(f"{c}\n{c}" for c in known[start : start + 5000])
        pieces = ours.tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert {place.start() for place in PLACE_TO_CUT.finditer(text)} <= {begin for _, (begin, _) in pieces}


@every_library
@pytest.mark.parametrize("character", ["\U00011de0", "\U000323b0", "\U00016ff4", "\ufdd1", "\U000e0fff", "\U0010ffff"])
def test_what_is_a_character_in_other_versions_of_unicode_only(library, character):
    """U+11DE0 is a digit and U+323B0 a letter in Unicode 17."""
    tokenizer = telling_tokenizer("cl100k")
    same_as_tokenizer(
        encoder_by(library, tokenizer), tokenizer, [f"{character}. {character}a{character}1{character}\na{character}"]
    )


@every_library
def test_golden_texts(library):
    encoder = encoder_by(library, golden_tokenizer())
    for case in golden_json("rendering.json")["encode"]:
        assert encoder.encode([case["text"]])[0].tolist()[1:] == case["ids"]


def real_texts(size: int) -> list[str]:
    """`size` bytes of prose, stories and textbooks in turn."""
    from datasets import load_dataset

    shards = [str(shared(f"data/pretrain/{kind}/shard_00000.parquet")) for kind in ("textbooks", "stories")]
    columns = [load_dataset("parquet", data_files=shard, split="train")["text"] for shard in shards]
    texts, bytes_left = [], size
    for pair in zip(*columns, strict=False):
        for text in pair:
            if bytes_left > 0:
                texts.append(text)
                bytes_left -= len(text.encode())
    assert bytes_left <= 0
    return texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "size"), [("nanochat", 5_000_000), ("cl100k", 500_000), ("qwen2", 500_000), ("gpt2", 500_000)]
)
def test_real_text(pattern, size):
    texts = real_texts(size)
    tokenizer = train_tokenizer(texts[:200], 4000, split_pattern=pattern)
    expected = encode_documents(tokenizer, texts)
    encoded = encoder_by("tiktoken", tokenizer).encode(texts)
    assert all(ids.tolist() == all_ids for ids, all_ids in zip(encoded, expected, strict=True))


@every_library
@pytest.mark.parametrize("threads", [1, 3])
def test_a_long_document_is_shared_by_the_threads(tokenizer, library, threads):
    text = "".join(PARAGRAPH.format(i, i) + "\n" * (i % 4) for i in range(6000))
    encoder = encoder_by(library, tokenizer, threads)
    parts = list(encoder.parts(text))
    assert len(text) > 500_000
    assert all(bulk_encoding.PART <= len(part) < bulk_encoding.PART + 200 for part in parts[:-1])
    (ids,) = encoder.encode([text])
    assert ids[1:].tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pattern", ["nanochat", "gpt2"])
@every_library
@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        "\n" * 300_000,
        " " * 300_000 + "x",
        "1" * 300_000,
        "漢" * 300_000,
        "'" * 300_000,
        "<|bos|>" * 50_000,
    ],
    ids=["one letter", "newlines", "blanks then x", "digits", "one ideograph", "quotes", "control tokens"],
)
def test_monotonous_documents(encoders, pattern, library, text):
    encoder = encoders[pattern, library]
    (ids,) = encoder.encode([text])
    assert ids.tolist()[1:] == encoder.tokenizer.encode(text, add_special_tokens=False).ids


@every_library
def test_a_megabyte_of_blanks_is_encoded_all_the_same(tokenizer, encoders, library):
    same_as_tokenizer(encoders["nanochat", library], tokenizer, ["a", " " * 1_000_000])


def test_tiktoken_refuses_a_megabyte_of_blanks(encoders):
    """Why it needs the tokenizer behind it."""
    with pytest.raises(ValueError, match="stack size"):
        encoders["nanochat", "tiktoken"].tiktoken.encode_to_numpy(" " * 1_000_000)


def test_blanks_that_the_fast_tokenizer_would_die_of(encoders, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization_nanochat, "TOO_MANY_BLANKS", 1000)
    alone, faster = encoders["nanochat", "tokenizers"], encoders["nanochat", "tiktoken"]
    with pytest.raises(UserError, match="1,000 blanks in a row"):
        alone.encode(["a", "b" + " \t" * 500])
    with pytest.raises(UserError, match="1,000 blanks in a row"):
        encode_documents(tokenizer, ["a", "b" + " \t" * 500])
    for text in ("b" + " " * 999, "b" + "\n" * 2000):
        assert alone.encode([text])[0].tolist() == faster.encode([text])[0].tolist()
    assert len(faster.encode([" " * 2000])[0]) > 1


@every_library
def test_half_a_surrogate_pair_is_a_replacement_character(tokenizer, encoders, library):
    broken, whole = ["a\ud800b", "\udc00", "\ud83d\ude00"], ["a\ufffdb", "\ufffd", "😀"]
    encoder = encoders["nanochat", library]
    same_as_tokenizer(encoder, tokenizer, whole)
    expected = [ids.tolist() for ids in encoder.encode(whole)]
    assert [ids.tolist() for ids in encoder.encode(broken)] == expected
    assert encode_documents(tokenizer, broken) == expected


def test_no_documents_have_no_ids(tokenizer, encoders):
    assert encode_documents(tokenizer, []) == encoders["nanochat", "tiktoken"].encode([]) == []


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_every_byte_string_comes_back(tokenizer, data):
    assert decode_bytes(tokenizer, encode_bytes(tokenizer, data)) == data


@every_library
def test_an_encoder_can_be_pickled(tokenizer, library):
    """A tokenizer from before the escape as well, which keeps control tokens out by a flag that pickling loses."""
    texts = [f"The cat's {i} 12345 <|bos|> " * 3000 for i in range(5)]
    for one in (tokenizer, changed(tokenizer, no_escape)):
        encoder = encoder_by(library, one, threads=2)
        same_as_tokenizer(pickle.loads(pickle.dumps(encoder)), one, texts)


def other_splits(name, pat_str, **rest):
    return tiktoken.core.Encoding(name, pat_str=SPLIT_PATTERNS["qwen2"], **rest)


def other_interface(name, *, ranks):
    raise AssertionError("not reached")


@pytest.mark.parametrize("encoding", [other_splits, other_interface])
def test_another_tiktoken_is_not_used(tokenizers, encoding, monkeypatch):
    monkeypatch.setattr(tiktoken, "Encoding", encoding)
    assert BulkEncoder(tokenizers["cl100k"]).tiktoken is None


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    change(description)
    backend = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", clean_up_tokenization_spaces=False)


def no_escape(description):
    description["pre_tokenizer"]["pretokenizers"].pop(0)


@every_pattern
@every_library
def test_tokenizers_from_before_the_escape(tokenizers, pattern, library):
    older = changed(tokenizers[pattern], no_escape)
    encoder = encoder_by(library, older)
    same_as_tokenizer(encoder, older, [PARAGRAPH, f"<|bos|> <|{ESCAPE}bos|>{PART_END} 1234"])


def other_pattern(description):
    description["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = r"\s?\w+|\W"


def no_pattern(description):
    description["pre_tokenizer"]["pretokenizers"].pop(1)


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


CHANGES = [other_pattern, no_pattern, lower_case, swapped_merges, missing_merge, ignored_merges, ordinary_added_token]


@every_pattern
@pytest.mark.parametrize("change", CHANGES)
def test_another_structure_is_left_to_the_tokenizer_itself(tokenizers, pattern, change):
    other = changed(tokenizers[pattern], change)
    encoder = BulkEncoder(other)
    assert encoder.tiktoken is None
    texts = ["The CAT's 123 don't <|bos|> <|output_end|>", "we'll  say\n naïve 漢字", f"<|{ESCAPE}bos|>"]
    with patch.object(bulk_encoding, "PART", 1):
        same_as_tokenizer(encoder, other, texts)


def test_a_token_reached_by_no_merge_of_its_own_is_left_to_the_tokenizer_itself():
    """`abc` is made of a + bc; tiktoken would also make it of ab + c."""
    symbols = byte_symbols()
    vocab = {symbol: i for i, symbol in enumerate(symbols)} | {"ab": 256, "bc": 257, "abc": 258}
    tokenizer = build_tokenizer(vocab, [("a", "b"), ("b", "c"), ("a", "bc")])
    assert BulkEncoder(tokenizer).tiktoken is None
    same_as_tokenizer(BulkEncoder(tokenizer), tokenizer, ["abc", "bcabcab"])


def test_the_beginning_is_added_once_where_the_tokenizer_adds_one_itself(tokenizer):
    assert tokenizer("cat").input_ids[0] == tokenizer.bos_token_id
    same_as_tokenizer(BulkEncoder(tokenizer), tokenizer, ["The cat", ""])


def test_a_dataset_is_tokenised_beforehand_by_several_processes(tokenizer):
    """What the README shows: the encoder travels to the processes of `Dataset.map`."""
    from datasets import Dataset

    texts = [f"It's the cat's {i}th don't; we'll say 漢字 of 12{i} <|bos|> kinds. 😀" for i in range(40)]
    encoder = BulkEncoder(tokenizer)
    data = Dataset.from_dict({"text": texts})
    tokens = data.map(
        lambda batch: {"input_ids": encoder.encode(batch["text"])}, batched=True, num_proc=2, remove_columns="text"
    )
    assert tokens["input_ids"][:] == encode_documents(tokenizer, texts)
