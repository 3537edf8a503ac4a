import json
import sys

import pytest
from transformers import AutoTokenizer

from modeling_nanochat.errors import UserError
from tokenizer_train.train import capped, main

TEXTS = [f"The {animal} number {i} sleeps under the old tree." for i in range(40) for animal in ("cat", "dog", "hen")]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the script on a small file, with more of its flags."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(*more):
        words = ["--train_files", str(tmp_path / "text.jsonl"), "--output_dir", str(tmp_path / "run" / "tokenizer"), *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        main()

    return run


def test_the_script_leaves_a_tokenizer_that_opens_anywhere_and_a_record(train, tmp_path, capsys):
    train("--vocab_size", "300", "--model_max_length", "128")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert len(tokenizer) == 300 and tokenizer.model_max_length == 128 and tokenizer.chat_template
    record = json.loads((tmp_path / "run" / "stages" / "tokenizer.json").read_text())
    assert record["settings"]["vocab_size"] == 300 and record["bytes_per_token"] > 1.5
    assert "300 entries" in capsys.readouterr().out


def test_a_finished_tokenizer_is_replaced_only_if_asked(train, tmp_path):
    train("--vocab_size", "300")
    with pytest.raises(UserError, match="overwrite_output_dir"):
        train("--vocab_size", "290")
    train("--vocab_size", "290", "--overwrite_output_dir", "true")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")) == 290


@pytest.mark.parametrize(("flags", "words"), [(["--vocab_size", "9000"], "lower --vocab_size"), (["--vocab_size", "9"], "265")])
def test_an_impossible_vocabulary_is_refused_and_nothing_is_left(train, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        train(*flags)
    assert not (tmp_path / "run").exists()


def test_limits_count_characters_of_the_beginnings():
    assert list(capped(["abcdef", "ghi", "jkl", "mno"], max_chars=6, doc_cap=4)) == ["abcd", "ghi"]
