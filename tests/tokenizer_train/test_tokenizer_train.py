"""The script as people meet it: from files to a folder that opens anywhere, and one line where something is wrong."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.token_bytes import token_bytes
from modeling_nanochat.tokenization_nanochat import RESPONSE_TEMPLATE, SPLIT_PATTERNS
from tokenizer_train.mixture import Source, by_weight, capped, one_after_the_other, open_sources
from tokenizer_train.train import TokenizerArguments, check, main

TEXTS = [f"The {animal} number {i} sleeps under the old tree." for i in range(40) for animal in ("cat", "dog", "hen")]
SCRIPT = Path(__file__).parents[2] / "tokenizer_train" / "train.py"


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script on the files, with more of its flags."""

    def run(files, *more, to="run"):
        words = ["--train_files", *files, "--output_dir", str(tmp_path / to / "tokenizer"), *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        main()

    return run


@pytest.fixture
def train(run, tmp_path):
    jsonl(tmp_path / "text.jsonl", TEXTS)
    return lambda *more, **options: run([str(tmp_path / "text.jsonl")], *more, **options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_script_leaves_a_tokenizer_that_opens_anywhere_and_a_record(train, tmp_path, capsys):
    train("--vocab_size", "300", "--model_max_length", "128")
    folder = tmp_path / "run" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert len(tokenizer) == 300 and tokenizer.model_max_length == 128
    assert tokenizer.response_template == RESPONSE_TEMPLATE and (folder / "chat_template.jinja").exists()
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    sizes = load_file(folder / "token_bytes.safetensors")["token_bytes"]
    assert sizes.dtype == "int32" and sizes.tolist() == token_bytes(tokenizer).tolist() and sizes[-9:].sum() == 0
    record = json.loads((tmp_path / "run" / "stages" / "tokenizer.json").read_text())
    assert record["settings"]["vocab_size"] == 300 and record["bytes_per_token"] > 1.5
    assert (record["documents"], record["characters"]) == (120, sum(map(len, TEXTS)))
    output = capsys.readouterr().out
    assert "read 5,250 characters in 120 documents" in output and "300 entries" in output


def test_a_batch_is_ready_for_generation(train, tmp_path):
    train("--vocab_size", "300")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    batch = tokenizer(["The cat", "The cat number 7"], padding=True)
    bos, longest = tokenizer.bos_token_id, batch["input_ids"][1]
    padding = batch["attention_mask"][0].count(0)
    assert padding > 0 and batch["attention_mask"][0] == [0] * padding + [1] * (len(longest) - padding)
    assert longest[0] == bos and batch["input_ids"][0][: padding + 1] == [tokenizer.pad_token_id] * padding + [bos]
    chat = [{"role": "user", "content": "The cat"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[0] == bos and ids.count(bos) == 1 and tokenizer.decode(ids[-1:]) == "<|assistant_start|>"


def test_every_run_writes_the_same_bytes(train, tmp_path):
    for to in ("a", "b"):
        train("--vocab_size", "320", to=to)
    a, b = (files_of(tmp_path / to / "tokenizer") for to in "ab")
    assert a == b and len(a) == 4


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_the_split_pattern_is_chosen_by_name(train, tmp_path, pattern):
    train("--vocab_size", "290", "--split_pattern", pattern)
    written = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text())
    patterns = [part.get("pattern", {}).get("Regex") for part in written["pre_tokenizer"]["pretokenizers"]]
    assert SPLIT_PATTERNS[pattern] in patterns


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, 32768), ({"training_recipe": "classic"}, 65536), ({"training_recipe": "classic", "vocab_size": 400}, 400)],
)
def test_the_recipe_sets_the_size_unless_it_is_given(given, size):
    args = TokenizerArguments(train_files=["x"], output_dir="nowhere/tokenizer", **given)
    check(args)
    assert args.vocab_size == size


def test_a_finished_tokenizer_is_replaced_only_if_asked(train, tmp_path):
    train("--vocab_size", "300")
    with pytest.raises(UserError, match="overwrite_output_dir"):
        train("--vocab_size", "290")
    train("--vocab_size", "290", "--overwrite_output_dir", "true")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")) == 290


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vocab_size", "9000"], "lower --vocab_size"),
        (["--vocab_size", "9"], "265"),
        (["--split_pattern", "gpt5"], "invalid choice: 'gpt5'.*nanochat.*cl100k.*qwen2.*gpt2"),
        (["--training_recipe", "launch"], "invalid choice: 'launch'.*current.*classic"),
        (["--doc_cap", "0"], "doc_cap is 0"),
        (["--max_chars", "-1"], "max_chars is -1"),
        (["--train_weights", "1", "2"], "2 weights for 1 entries"),
        (["--train_weights", "0"], "0.0 is not a share"),
        (["--train_weights", "-1"], "-1.0 is not a share"),
        (["--train_weights", "nan"], "nan is not a share"),
        (["--train_weights", "inf"], "inf is not a share"),
    ],
)
def test_an_impossible_request_is_refused_and_nothing_is_left(train, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        train(*flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_told_before_reading(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train("--vocab_size", "300", to="file")


# what to read


def test_limits_count_characters_of_the_beginnings():
    source = Source("x", ["abcdef", "ghi", "jkl", "mno"])
    assert list(one_after_the_other([source], doc_cap=4, max_chars=6)) == ["abcd", "ghi"]
    assert (source.characters, source.documents) == (7, 2)


def test_exactly_the_limit_is_not_over_it():
    assert list(one_after_the_other([Source("x", ["abc", "def", "ghi"])], 10, 3)) == ["abc", "def"]


def test_half_surrogates_are_whole_before_they_count():
    assert [capped(text, 3) for text in ("\ud83d\ude00x\ud800yz", "abc")] == ["😀x\ufffd", "abc"]


def test_weights_hold_at_every_point_and_reading_ends_with_the_first_source(capsys):
    sources = [Source("a", ["a" * 10] * 1000, 3), Source("b", ["b" * 35] * 20, 1)]
    read = list(by_weight(sources, 1000, 10**6))
    for count in range(1, len(read) + 1):
        characters = "".join(read[:count]).count("b")
        assert abs(characters - sum(map(len, read[:count])) / 4) <= 35
    assert [source.characters for source in sources] == [2110, 700]
    assert "b: no more text" in (line := capsys.readouterr().out) and "700 characters of it, 2,810 in all" in line


def test_weights_stop_at_the_limit_without_a_word(capsys):
    sources = [Source("same", ["a" * 10] * 100, 1), Source("same", ["b" * 10] * 100, 1)]
    assert "".join(by_weight(sources, 1000, 40)) == "aaaaaaaaaabbbbbbbbbb" * 2 + "a" * 10
    assert not capsys.readouterr().out


def test_several_sources_by_weight_through_the_script(run, tmp_path):
    files = [jsonl(tmp_path / "a.jsonl", TEXTS), jsonl(tmp_path / "b.jsonl", ["def f(x): return x + 1"] * 500)]
    run(files, "--vocab_size", "300", "--train_weights", "3", "1", "--max_chars", "4000")
    record = json.loads((tmp_path / "run" / "stages" / "tokenizer.json").read_text())
    a, b = record["sources"]
    assert (a["name"], b["name"]) == tuple(files) and record["settings"]["train_weights"] == [3.0, 1.0]
    assert 2900 <= a["characters"] <= 3100 and 950 <= b["characters"] <= 1050
    assert 4000 < record["characters"] < 4050


def test_without_weights_all_is_read_in_order_files_and_hub_alike(hub, tmp_path):
    for name in ("corpus", "other"):
        hub.put(f"me/{name}", {"train.jsonl": '{"text": "from the hub"}\n'}, kind="datasets")
    local = [jsonl(tmp_path / "a.jsonl", ["one", None, "two"]), jsonl(tmp_path / "b.jsonl", ["three"])]
    sources = open_sources(["me/corpus:default:train", *local, "me/other"], None, 100)
    assert list(one_after_the_other(sources, 100, 1000)) == ["from the hub", "one", "two", "three", "from the hub"]
    assert all(request.range for request in hub.sent("train.jsonl"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Streamed, since the pages of a file that is mapped into memory count as the process's own."""
    program = (
        "import resource; from modeling_nanochat.text import texts; texts.WHOLE_UP_TO = 0;"
        "from tokenizer_train.train import main; main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    line = "".join(filter(str.isalpha, "".join(TEXTS)))[:3000]  # one word, which is split and counted fast
    peaks = []
    for times in (1000, 20_000):  # 3 and 60 MB
        files = tmp_path / f"{times}.parquet"
        pq.write_table(pa.table({"text": [line] * times}), files, row_group_size=1024, use_dictionary=False)
        words = [
            "--train_files",
            str(files),
            "--output_dir",
            str(tmp_path / str(times) / "tokenizer"),
            "--vocab_size",
            "300",
        ]
        # by a shell: the peak that is told begins with that of the process that started this one
        command = ["sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", program, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"{3000 * times:,} characters" in done.stdout
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks  # MB; buffers of the readers


# what is wrong with the text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9 au lait\n", "not UTF-8 text"),
        ("a.txt", b"good text\n\n" * 20_000 + b"caf\xe9\n", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "good"}\n' * 5000 + b'{"text": "caf\xe9"}\n', "not UTF-8 text"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n\n \n\t\n", "no text|every document is empty"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "every document is empty"),
        ("a.jsonl", b'{"text": 5}\n', "instead of text"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_text_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, name, content, words, streamed):
    if streamed:
        monkeypatch.setattr("modeling_nanochat.text.texts.WHOLE_UP_TO", 0)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        run([str(tmp_path / name)], "--vocab_size", "280")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_rows_without_text_are_passed_over(run, tmp_path):
    pq.write_table(pa.table({"text": [None, *TEXTS, None]}), tmp_path / "a.parquet")
    run([str(tmp_path / "a.parquet")], "--vocab_size", "300")
    assert json.loads((tmp_path / "run" / "stages" / "tokenizer.json").read_text())["documents"] == len(TEXTS)


def test_surrogates_in_json(run, tmp_path):
    """A pair is its character; half of one is no JSON text, and the line is named."""
    (tmp_path / "pair.jsonl").write_text('{"text": "smile \\ud83d\\ude00 smile"}\n' * 5)
    run([str(tmp_path / "pair.jsonl")], "--vocab_size", "272")
    assert "😀" in AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer").decode(
        AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")("😀")["input_ids"]
    )
    (tmp_path / "half.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud800 of it"}\n')
    with pytest.raises(UserError, match=re.escape("half.jsonl")):
        run([str(tmp_path / "half.jsonl")], "--vocab_size", "266", to="half")


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl"])
def test_one_enormous_document_is_cut_and_that_is_told(run, tmp_path, name, capsys):
    text = "The cat number 7 sleeps under the old tree. " * 250_000  # 11 MB
    (tmp_path / name).write_text(text if name.endswith("txt") else json.dumps({"text": text}))
    run([str(tmp_path / name)], "--vocab_size", "270")
    record = json.loads((tmp_path / "run" / "stages" / "tokenizer.json").read_text())
    assert (record["characters"], record["documents"], record["documents_cut"]) == (10_000, 1, 1)
    assert record["characters_left_out"] == record["sources"][0]["characters_left_out"] == len(text) - 10_000
    told = [line for line in capsys.readouterr().out.splitlines() if "--doc_cap" in line]
    assert (
        len(told) == 1
        and f"1 of them longer than 10,000 characters: {record['characters_left_out']:,} characters" in told[0]
    )


def test_documents_that_fit_are_not_told_to_be_cut(train, tmp_path, capsys):
    longest = max(map(len, TEXTS))
    train("--vocab_size", "300", "--doc_cap", str(longest))
    assert "--doc_cap" not in capsys.readouterr().out
    train("--vocab_size", "290", "--doc_cap", str(longest - 1), to="cut")
    count = sum(len(text) == longest for text in TEXTS)
    assert f"{count} of them longer" in capsys.readouterr().out
    record = json.loads((tmp_path / "cut" / "stages" / "tokenizer.json").read_text())
    assert record["documents_cut"] == record["characters_left_out"] == count


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_half_written(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", [" ".join(TEXTS)] * 20_000)
    words = [sys.executable, str(SCRIPT), "--train_files", files, "--output_dir", str(tmp_path / "run" / "tokenizer")]
    program = "import sys; from tokenizer_train import train as t; r = t.Reading.__iter__\n"
    program += "def told(self):\n for text in r(self):\n  print('reading', flush=True); yield text\n"
    program += "t.Reading.__iter__ = told; t.main()"
    started = subprocess.Popen(
        [words[0], "-c", program, *words[2:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "reading\n"
    started.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = started.communicate(timeout=60)
    assert started.returncode != 0 and "KeyboardInterrupt" in errors and time.monotonic() - began < 20
    assert not (tmp_path / "run").exists()
