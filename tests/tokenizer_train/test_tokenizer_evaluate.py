import contextlib
import hashlib
import json
import shutil
import sys
import time

import numpy as np
import pytest
from conftest import toy_tokenizer
from golden import shared
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.bulk_encoding import BulkEncoder
from modeling_nanochat.text.token_bytes import token_spellings
from modeling_nanochat.tokenization_nanochat import build_tokenizer, byte_symbols, encode_documents
from tokenizer_train import vocabularies
from tokenizer_train.evaluate import (
    TokenizerEvaluateArguments,
    evaluate_tokenizer,
    load_tokenizer,
    main,
    round_trip,
)
from tokenizer_train.texts import Text, corpus_text, given_text, sample_texts
from tokenizer_train.vocabularies import load_baselines, parse_baselines
from tokenizer_train.vocabulary_statistics import KINDS, kind_of, vocabulary_statistics

SIZES = {"news": 1728, "korean": 1060, "code": 1393, "math": 1349, "science": 1156}
ODD = [
    " \n ",
    "a\r\n\r\n b",
    "12345 678",
    "I'LL they'Ve ſ",
    "\u3000\u00a0x",
    "नमस्ते 한국 🙂",
    "<|endoftext|>",
    "x\n\n\n",
    "\t\tif",
    "!!\n",
]
PIECES = [
    " ",
    "\n",
    "\r\n",
    "\t",
    "a",
    "'s",
    "'LL",
    "12",
    "345",
    "é",
    "한",
    "’",
    "!?",
    "\u00a0",
    "\u200b",
    "\x85",
    "²",
    "_",
    "🙂",
]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """tiktoken's cache folder, which on a real machine may hold the vocabularies."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "tokenizer"
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def fill_cache(cache):
    """The shared files under the names that tiktoken gives them."""
    cache.mkdir()
    for path, name in (
        ("gpt2/vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("gpt2/encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
        ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    ):
        shutil.copy(shared(f"data/tokenizers/{path}"), cache / name)


def mixed_documents():
    """Sample texts, odd ones, and random strings of what the split patterns tell apart."""
    random = np.random.default_rng(0)
    drawn = ["".join(random.choice(PIECES, size=random.integers(1, 12))) for _ in range(500)]
    return [text.documents[0] for text in sample_texts()] + ODD + drawn


def evaluated(tokenizer, **settings):
    return evaluate_tokenizer(TokenizerEvaluateArguments(tokenizer=tokenizer, **settings))


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


# the texts


def test_the_sample_texts_are_what_the_figures_were_measured_on():
    assert {text.name: text.bytes for text in sample_texts()} == SIZES


def test_a_corpus_gives_whole_documents_up_to_a_number_of_bytes(tmp_path):
    path = write_texts(tmp_path / "corpus.jsonl", ["", "   ", *(f"{n:09d}\n" for n in range(50))])
    text = corpus_text("val", [path], 95)
    assert text.bytes == 100 and len(set(text.documents)) == 10  # each of 10 bytes: the tenth fills 95
    assert text == corpus_text("val", [path], 95)
    assert corpus_text("val", [path], 10**6).bytes == 500


def test_a_text_of_ones_own_is_checked(tmp_path):
    (tmp_path / "a.txt").write_bytes("zwölf".encode("latin1"))
    (tmp_path / "b.txt").write_text(" \n")
    for argument, words in (
        ("a.txt", "not of the form name=file"),
        (f"x={tmp_path}/none.txt", "cannot be read"),
        (f"x={tmp_path}/a.txt", "not UTF-8"),
        (f"x={tmp_path}/b.txt", "no text in it"),
    ):
        with pytest.raises(UserError, match=words):
            given_text(argument)


# GPT-2's and GPT-4's vocabulary


def test_token_counts_are_those_of_tiktoken(empty_cache):
    import tiktoken

    fill_cache(empty_cache)
    documents = mixed_documents()
    found, missing = load_baselines()
    assert not missing
    for vocabulary, (name, entries) in zip(found, (("gpt2", 50257), ("cl100k_base", 100277)), strict=True):
        expected = [len(tiktoken.get_encoding(name).encode_ordinary(document)) for document in documents]
        assert [vocabulary.count([document]) for document in documents] == expected
        assert vocabulary.count(documents) == sum(expected) and vocabulary.entries == entries
        parts = "".join(f"{document} " for document in documents) * 3  # longer than a part
        assert vocabulary.count([parts]) == len(tiktoken.get_encoding(name).encode_ordinary(parts))


def test_what_is_too_much_for_tiktoken_is_counted_all_the_same(empty_cache):
    fill_cache(empty_cache)
    for vocabulary in load_baselines()[0]:
        assert 1_000_000 / 128 < vocabulary.count([" " * 1_000_000 + "b"]) <= 1_000_001


def test_what_cannot_be_had_offline_is_named_at_once():
    started = time.perf_counter()
    found, missing = load_baselines({"nothing": "nobody/nothing"})
    assert found == [] and list(missing) == ["GPT-2", "GPT-4", "nothing"]
    assert "offline" in missing["GPT-2"] and "set TIKTOKEN_CACHE_DIR" in missing["GPT-4"]
    assert "could not be opened" in missing["nothing"]
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("behaviour", "words"), [(lambda name: time.sleep(2), "TimeoutError"), (lambda name: 1 / 0, "ZeroDivisionError")]
)
def test_a_download_that_fails_or_hangs_is_given_up(behaviour, words, monkeypatch):
    monkeypatch.setattr(vocabularies, "is_offline_mode", lambda: False)
    monkeypatch.setattr(vocabularies, "DOWNLOAD_SECONDS", 0.3)
    monkeypatch.setattr("tiktoken.get_encoding", behaviour)
    started = time.perf_counter()
    found, missing = load_baselines()
    assert found == [] and words in missing["GPT-2"] and words in missing["GPT-4"]
    assert time.perf_counter() - started < 2


def test_the_names_in_the_cache_are_those_of_tiktoken(monkeypatch):
    """They decide whether a vocabulary is there when offline."""
    import tiktoken.load
    import tiktoken_ext.openai_public as public

    asked = []

    def read(url, expected_hash=None):
        asked.append(hashlib.sha1(url.encode()).hexdigest())
        return b"" if url.endswith(".tiktoken") else b"{}"

    monkeypatch.setattr(tiktoken.load, "read_file_cached", read)
    for encoding, files in vocabularies.PUBLISHED.values():
        with contextlib.suppress(AssertionError):  # tiktoken compares two files, here empty ones
            public.ENCODING_CONSTRUCTORS[encoding]()
        assert tuple(asked) == files
        asked.clear()


def test_without_tiktoken_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    found, missing = load_baselines()
    assert not found and "pip install tiktoken" in missing["GPT-2"] and "pip install tiktoken" in missing["GPT-4"]


def test_baselines_are_named_after_their_folder_or_as_one_likes():
    named = parse_baselines(["Qwen/Qwen3-0.6B", "runs/a/tokenizer", "other=runs/b/tokenizer"])
    assert named == {"Qwen3-0.6B": "Qwen/Qwen3-0.6B", "tokenizer": "runs/a/tokenizer", "other": "runs/b/tokenizer"}


# the evaluation


def test_the_record_holds_the_launch_table(toy_folder, tmp_path, empty_cache):
    fill_cache(empty_cache)
    val = write_texts(tmp_path / "val.jsonl", ["The cat sat.", "Is it <|bos|> 한?"])
    record = evaluated(toy_folder, val_files=[val], baselines=[f"toy={toy_folder}"])
    assert [v["name"] for v in record["vocabularies"]] == ["GPT-2", "GPT-4", "toy", "ours"]
    assert [t["name"] for t in record["texts"]] == [*SIZES, "val"] and record["missing"] == {}
    tokenizer, row = toy_tokenizer(), record["texts"][-1]
    tokens = sum(len(ids) - 1 for ids in encode_documents(tokenizer, ["The cat sat.", "Is it <|bos|> 한?"]))
    assert row["tokens"]["ours"] == row["tokens"]["toy"] == tokens
    assert row["bytes"] == 12 + 18 and row["words"] == 7 and row["documents"] == 2
    gpt2 = row["tokens"]["GPT-2"]
    assert row["fewer_percent"]["GPT-2"] == pytest.approx(100 * (gpt2 - tokens) / gpt2, abs=0.01)
    assert row["fewer_percent"]["toy"] == 0 and row["bytes_per_token"]["GPT-2"] == pytest.approx(30 / gpt2, abs=1e-4)
    assert record["settings"]["max_bytes"] == 5_000_000 and record["statistics"]["used"].keys() == {"val"}


def test_the_script_writes_the_record_and_prints_a_table(toy_folder, tmp_path, monkeypatch, capsys):
    target = tmp_path / "run" / "results" / "tokenizer.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--tokenizer", toy_folder, "--output_file", str(target)])
    main()
    assert [path.name for path in target.parent.iterdir()] == ["tokenizer.json"]
    assert json.loads(target.read_text())["tokenizer"] == toy_folder
    printed = capsys.readouterr().out
    assert "korean   1,060" in printed and "left out: GPT-2" in printed and "320, of these 9 special" in printed
    assert max(map(len, printed.splitlines()[1:9])) < 120  # a screen is enough


def test_missing_baselines_have_no_columns(toy_folder):
    rows = evaluated(toy_folder)["table"]
    assert rows[0] == ["text", "bytes", "ours (320)", "ratio", "per word"]


def test_a_tokenizer_that_loses_text_is_refused_by_the_texts_name():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"mine \(here\): encoding and decoding changes document 2"):
        round_trip(Text("mine", ["lower", "Upper"], "here"), BulkEncoder(tokenizer), token_spellings(tokenizer))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"texts": ["news=a.txt"]}, "a.txt: cannot be read"),
        ({"baselines": ["GPT-2"]}, "GPT-2 needs a unique name"),
        ({"baselines": ["a/tokenizer", "b/tokenizer"]}, "write name=b/tokenizer"),
        ({"val_files": ["nowhere.parquet"]}, "val_files: no file matches"),
    ],
)
def test_wrong_settings_are_told(toy_folder, settings, words):
    with pytest.raises(UserError, match=words):
        evaluated(toy_folder, **settings)


def test_two_texts_of_one_name_are_refused(toy_folder, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="'news' is the name of two"):
        evaluated(toy_folder, texts=[f"news={tmp_path}/a.txt"])


def test_an_empty_corpus_is_refused(toy_folder, tmp_path):
    with pytest.raises(UserError, match="val_files: no text"):
        evaluated(toy_folder, val_files=[write_texts(tmp_path / "val.jsonl", ["", " "])])


def test_what_is_no_tokenizer_of_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a tokenizer folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="could not be opened"):
        load_tokenizer(str(broken))
    words = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1, "schön": 2, "日本": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match="byte"):
        load_tokenizer(str(tmp_path / "words"))
    plain = toy_tokenizer().backend_tokenizer.to_str().replace("<|bos|>", "<|begin|>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(plain)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"no <\|bos\|> token"):
        load_tokenizer(str(tmp_path / "other"))


# the vocabulary


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        (b"a", "single bytes"),
        (b"\xe2", "single bytes"),
        (b" the", "space and letters"),
        (b"ing", "letters"),
        (b" 12", "digits"),
        (b" ==", "punctuation and symbols"),
        (b"  \n", "white space"),
        (b"'s", "letters and other signs"),
        ("été".encode(), "beyond ASCII"),
        ("한".encode()[:2], "part of a character"),
    ],
)
def test_kinds_of_tokens(spelling, kind):
    assert kind_of(spelling) == kind


def test_statistics_count_every_token_once():
    tokenizer = toy_tokenizer()
    statistics = vocabulary_statistics(tokenizer, {"val": np.array([0, 3, 1])})
    lengths = [len(spelling) for spelling in token_spellings(tokenizer) if spelling]
    assert statistics["entries"] == 320 and statistics["special_tokens"] == 9
    assert sum(statistics["kinds"].values()) == 311 and tuple(statistics["kinds"]) == KINDS
    assert statistics["kinds"]["single bytes"] == 256 and statistics["used"] == {"val": 2}
    assert statistics["token_bytes"]["max"] == len(statistics["longest"][0]) == max(lengths)
    assert statistics["token_bytes"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-3)
    assert statistics["token_bytes"]["std"] == pytest.approx(np.std(lengths, ddof=1), abs=1e-3)
    assert statistics["unreachable"] == {"tokens": 0, "examples": []}


def test_tokens_that_are_never_given_are_found():
    """ "b c" is cut by the split pattern; "abc" is merged from "a" and "bc", but "ab" comes first."""
    symbols = byte_symbols()
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("b", symbols[32]), ("b" + symbols[32], "c")]
    vocabulary |= {"".join(pair): 256 + index for index, pair in enumerate(merges)}
    unreachable = vocabulary_statistics(build_tokenizer(vocabulary, merges))["unreachable"]
    assert unreachable == {"tokens": 3, "examples": ["abc", "b ", "b c"]}
