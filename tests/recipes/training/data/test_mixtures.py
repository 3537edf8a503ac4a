"""Mixtures: which rows they take, how often and in which order, from every format, and what they refuse."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError
from recipes.midtrain import MidtrainArguments, train_and_validation_sets
from recipes.sft import SFTArguments
from recipes.training.arguments import LoopArguments
from recipes.training.data.conversations import Renderer
from recipes.training.data.mixtures import Source, check_beginnings, parse_mixture, read_mixture, repeated
from recipes.training.data.validation import split
from recipes.training.stage import OutputArguments
from recipes.training.trl.settings import SFTSettings, parse_settings
from recipes.training.trl.stage import output_arguments

ROOT = Path(__file__).parents[4]
GSM8K = {"question": "1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}
MMLU = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
ARC = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
LETTERS = "Multiple Choice question: Which?\n- a={}\n- b={}\n\nRespond only with the letter of the correct answer."
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}


def chat(question, answer="Yes."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def renderer(toy_model_and_tokenizer):
    def make(max_length=999, **options):
        return Renderer(toy_model_and_tokenizer[1], max_length, **options)

    return make


@pytest.fixture
def mixed(renderer, toy_model_and_tokenizer):
    """Texts of the conversations of a mixture, in its order."""

    def texts(*entries, seed=42, **options):
        conversations = read_mixture(parse_mixture(entries, "mixture"), renderer(**options), seed, "mixture")
        return [toy_model_and_tokenizer[1].decode(ids) for ids, _ in conversations]

    return texts


def questions(texts):
    return [re.search(r"<\|user_start\|>(.*?)<\|user_end\|>", text, re.DOTALL)[1] for text in texts]


def test_rows_are_drawn_and_shuffled_as_in_the_original(tmp_path, mixed):
    """Each source permuted by the seed and cut, then all pairs of task and row in task order, shuffled by the seed."""
    sizes, taken, times = {"a": 9, "b": 5}, {"a": 4, "b": 5}, {"a": 1, "b": 2}
    for name, size in sizes.items():
        write(tmp_path / f"{name}.jsonl", [chat(f"{name} {i}") for i in range(size)])
    pairs = []
    for name, size in sizes.items():
        rows = np.random.default_rng(42).permutation(size)[: taken[name]]
        pairs += [f"{name} {row}" for row in rows] * times[name]
    random.Random(42).shuffle(pairs)
    entries = [{"source": f"{tmp_path}/a.jsonl", "rows": 4}, {"source": f"{tmp_path}/b.jsonl", "epochs": 2}]
    assert questions(mixed(*entries)) == pairs
    assert questions(mixed(*entries, seed=7)) != pairs


def test_of_each_source_at_most_max_rows_are_taken_before_its_epochs(tmp_path, renderer):
    for name, size in {"a": 9, "b": 2}.items():
        write(tmp_path / f"{name}.jsonl", [chat(f"{name} {i}") for i in range(size)])
    (tmp_path / "words.txt").write_text("lamp mat cat")
    entries = [{"source": f"{tmp_path}/a.jsonl", "rows": 8, "epochs": 2}, f"{tmp_path}/b.jsonl"]
    entries.append({"source": "simple_spelling", "rows": 1000, "words": str(tmp_path / "words.txt")})
    render = renderer()
    assert len(read_mixture(parse_mixture(entries, "mixture"), render, 42, "mixture", max_rows=3)) == 2 * 3 + 2 + 3


def test_the_order_is_the_same_whatever_the_process(tmp_path, mixed):
    files = [write(tmp_path / f"{name}.jsonl", [chat(f"{name} {i}") for i in range(20)]) for name in "ab"]
    entries = [{"source": files[0], "rows": 15}, {"source": files[1], "epochs": 1.5}]
    program = (
        "import hashlib, json, sys; from conftest import toy_tokenizer; from recipes.training.data.mixtures import *\n"
        "mixture = parse_mixture(json.loads(sys.argv[1]), 'mixture')\n"
        "found = read_mixture(mixture, Renderer(toy_tokenizer(), 999, show_progress=False), 42, 'mixture')\n"
        "print(hashlib.sha256(b'|'.join(ids.tobytes() for ids, _ in found)).hexdigest())"
    )
    path = os.pathsep.join(
        map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "support", os.environ.get("PYTHONPATH", "")))
    )
    digests = set()
    for rank in ("0", "3"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4", "PYTHONHASHSEED": rank, "PYTHONPATH": path}
        command = [sys.executable, "-c", program, json.dumps(entries)]
        digests.add(subprocess.run(command, env=os.environ | own, check=True, capture_output=True, text=True).stdout)
    texts = mixed(*entries)
    assert len(digests) == 1 and len(texts) == 45


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.floats(0.02, 5), st.data())
def test_rows_and_epochs_give_exact_counts(size, epochs, data):
    rows = list(range(size))
    if round(size * epochs) == 0:
        with pytest.raises(UserError, match="are none"):
            repeated(rows, epochs, "here")
        return
    found = repeated(rows, epochs, "here")
    assert len(found) == round(size * epochs)
    times = {row: found.count(row) for row in rows}
    assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize(
    ("record", "format", "expected"),
    [
        (chat("Hi", "Hello."), None, "Hi -> Hello."),
        (SHAREGPT, None, "Hi -> Hello."),
        ({"conversations": chat("Hi", "Hello.")["messages"]}, None, "Hi -> Hello."),
        (chat("Hi", "Hello.") | GSM8K, None, "Hi -> Hello."),
        (
            chat("Hi", "Hello.") | GSM8K,
            "gsm8k",
            "1+1? -> 1+1 = <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>2\n#### 2",
        ),
        (
            {"train": MMLU},
            None,
            LETTERS.format("A", "B") + " -> B",
        ),
        (
            ARC,
            None,
            LETTERS.format(1, 2) + " -> 2",
        ),
    ],
)
def test_formats_are_told_by_the_fields_or_by_name(tmp_path, mixed, record, format, expected):
    (text,) = mixed({"source": write(tmp_path / "a.jsonl", [record]), "format": format})
    question, answer = expected.split(" -> ")
    assert text == (f"<|bos|><|user_start|>{question}<|user_end|><|assistant_start|>{answer}<|assistant_end|>")


def test_spelling_is_generated_from_a_list_of_words(tmp_path, mixed):
    (tmp_path / "words.txt").write_text("lamp\nzoo\n")
    spelling = {"source": "simple_spelling", "words": f"{tmp_path}/words.txt", "rows": 6}
    texts = mixed(spelling, spelling | {"source": "spelling_bee", "rows": 5})
    counting = [text for text in texts if "<|python_start|>" in text]
    assert len(texts) == 11 and len(counting) == 5
    assert all("Spell the word:" in text for text in texts if text not in counting)
    held_out = mixed(spelling | {"source": "spelling_bee:test", "rows": 5})
    assert not set(held_out) & set(counting)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (3, "expected a name, or a mapping with `source` and optionally rows, epochs, format, words"),
        ({"rows": 3}, "expected a name, or a mapping with `source`"),
        ("{nonsense", "not valid JSON"),
        ({"source": ""}, "`source` must be the name"),
        ({"source": "a", "row": 3}, "unknown key 'row', did you mean 'rows'\\?"),
        ({"source": "a", "weight": 3}, "unknown key 'weight'; there are source, rows, epochs, format, words"),
        ({"source": "a", "rows": 0}, r"\(a\): `rows` must be a whole number from 1 on, or left out, found 0"),
        ({"source": "a", "rows": 1.5}, "`rows` must be a whole number"),
        ({"source": "a", "rows": True}, "`rows` must be a whole number"),
        ({"source": "a", "epochs": 0}, "`epochs` must be a number above 0"),
        ({"source": "a", "epochs": "2"}, "`epochs` must be a number above 0"),
        ({"source": "a", "epochs": float("nan")}, "`epochs` must be a number above 0"),
        ({"source": "a", "format": "alpaca"}, "`format` must be one of messages, sharegpt, cloze, arc, mmlu"),
        ({"source": "a", "words": "b"}, "`words` is for generated tasks only"),
        ({"source": "spelling_bee", "rows": 3}, r"\(spelling_bee\): a generated task needs `rows` and `words`"),
        ({"source": "spelling_bee", "words": "a"}, "a generated task needs `rows` and `words`"),
        ({"source": "first"}, "first is listed twice; use `epochs` to repeat it"),
    ],
)
def test_a_malformed_entry_is_named(entry, complaint):
    with pytest.raises(UserError, match=f"^mixture, entry 2.*{complaint}") as error:
        parse_mixture(["first", entry], "mixture")
    assert "\n" not in str(error.value)


def test_yaml_and_command_line_say_the_same(tmp_path):
    mixture = ["me/chats", {"source": "me/sums:main:train", "rows": 5, "epochs": 2}]
    config = tmp_path / "midtrain.yaml"
    config.write_text(yaml.safe_dump({"model_name_or_path": "m", "output_dir": "o", "mixture": mixture}))
    from_yaml = parse(MidtrainArguments, LoopArguments, OutputArguments, args=["--config", str(config)])[0]
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--mixture", "me/chats", json.dumps(mixture[1])]
    typed = parse(MidtrainArguments, LoopArguments, OutputArguments, args=words)[0]
    sft, _, given_keys = parse_settings(SFTArguments, SFTSettings, words)
    expected = [Source("me/chats"), Source("me/sums:main:train", rows=5, epochs=2)]
    for args in (from_yaml, typed, sft):
        assert parse_mixture(args.mixture, "mixture") == expected
    assert given_keys["mixture"] == words[-2:]


def test_the_mixtures_of_the_readme_are_those_of_the_original():
    blocks = re.findall(r"```yaml\n(mixture:.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    midtrain, sft = map(yaml.safe_load, blocks)
    parsed = [parse_mixture(mixture, "mixture") for mixture in (*midtrain.values(), sft["mixture"])]
    assert [[entry.rows for entry in mixture] for mixture in parsed] == [
        [None] * 3, [None, 5200, 420], [None, None, None, 10_000],
    ]  # fmt: skip
    assert parsed[0][1].source == "cais/mmlu:auxiliary_train:train"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--train_files", "a", "--mixture", "b"], "^give either train_files or mixture, not both"),
        ([], "^--train_files is missing; set it"),
        (["--train_files", "a", "--max_rows", "3"], "^max_rows has no effect without mixture"),
    ],
)
def test_either_files_or_a_mixture_are_needed(more, complaint):
    words = ["--model_name_or_path", "m", "--output_dir", "o", *more]
    with pytest.raises(UserError, match=complaint):
        parse(MidtrainArguments, LoopArguments, OutputArguments, args=words)
    with pytest.raises(UserError, match=complaint):
        output_arguments(*parse_settings(SFTArguments, SFTSettings, words)[:2])


def test_sources_that_lack_what_is_asked_for_are_named(tmp_path, mixed):
    two = write(tmp_path / "two.jsonl", [chat("a"), chat("b")])
    (tmp_path / "empty.jsonl").touch()
    for entry, complaint in (
        ({"source": two, "rows": 3}, r"two.jsonl\): has 2 rows, not 3; lower `rows`, or repeat them by `epochs`"),
        ({"source": two, "epochs": 0.1}, r"two.jsonl\): 0.1 epochs of 2 rows are none; raise `epochs`"),
        (f"{tmp_path}/nowhere.jsonl", "no file matches .*nowhere.jsonl"),
        (f"{tmp_path}/empty.jsonl", "empty.jsonl is empty"),
        ("me/chats", "me/chats: no local file or folder"),
        ({"source": "spelling_bee", "rows": 2, "words": f"{tmp_path}/nowhere.txt"}, "words: no file matches"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            mixed(entry)
        assert "\n" not in str(error.value)


def test_rows_of_a_data_set_on_the_hub_are_those_of_its_file(tmp_path, mixed, hub):
    file = write(tmp_path / "train.jsonl", [chat(f"{i}") for i in range(30)])
    hub.put("me/chats", {"train.jsonl": Path(file).read_text()}, kind="datasets")
    assert mixed({"source": "me/chats:train", "rows": 7}) == mixed({"source": file, "rows": 7})
    with pytest.raises(UserError, match=r"me/chats\): has 30 rows, not 31"):
        mixed({"source": "me/chats", "rows": 31})


def test_shares_are_printed(tmp_path, mixed, capsys):
    long = write(tmp_path / "long.jsonl", [chat("x", "y" * 99), chat("x", "y" * 999)])
    short = write(tmp_path / "short.jsonl", [chat("x")])
    mixed({"source": long}, {"source": short, "epochs": 3}, max_length=500)
    lines = capsys.readouterr().out.splitlines()
    assert f"{long}: left out: 1 rows, first {long}:2: more than max_length 500 tokens" in lines
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.startswith((long, short)) and "%" in line}
    assert cells[long][:3] == ["1", "1", "1"] and cells[short][:3] == ["3", "3", "0"]
    tokens = {name: int(row[3]) for name, row in cells.items()}
    assert tokens[short] % 3 == 0 and cells[short][4] == f"{tokens[short] / sum(tokens.values()):.1%}"
    mixed(short, show_progress=False)
    assert not capsys.readouterr().out


QUESTION = chat("a")["messages"][0]
BAD = {
    "two users in a row": ({"messages": [QUESTION, QUESTION]}, "role 'user' is out of order"),
    "unknown role": ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
    "no answer": ({"messages": [QUESTION]}, "no answer of the assistant to train on"),
    "no messages": ({"text": "a"}, "no `messages`"),
    "no list": ({"conversations": "a"}, "`messages` must be a non-empty list"),
    "no call": (
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [3]}]},
        "a tool call needs",
    ),
    "no weight": (
        {"messages": [QUESTION, chat("a")["messages"][1] | {"weight": 2}]},
        "`weight` must",
    ),
    "weight 0": ({"messages": [QUESTION, chat("a")["messages"][1] | {"weight": 0}]}, "no answer of"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path, mixed, capsys, name):
    row, reason = BAD[name]
    file = write(tmp_path / "a.jsonl", [chat("good"), row, chat("too"), row])
    with pytest.raises(UserError, match=f"^{file}:2.*{reason}"):
        mixed(file)
    capsys.readouterr()
    assert sorted(questions(mixed(file, on_bad_row="skip"))) == ["good", "too"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out: " in line]
    assert line.startswith(f"{file}: left out: 2 rows, first {file}:2: ") and reason in line


def test_if_nothing_is_left_that_is_said(tmp_path, mixed):
    file = write(tmp_path / "a.jsonl", [BAD["unknown role"][0], chat("x" * 300)])
    with pytest.raises(UserError, match="^mixture: none of 2 conversations is left: all are bad or"):
        mixed(file, on_bad_row="skip", max_length=64)


def test_fields_that_are_not_read_are_named_once(tmp_path, mixed, capsys):
    user, answer = chat("a")["messages"]
    rows = [{"messages": [user, answer | {"reasoning_content": "Hm."}], "origin": "x"}, chat("b")] * 3
    empty = {"messages": [user | {"weight": 1}, answer | {"thinking": None, "refusal": "", "weight": 1}]}
    file = write(tmp_path / "a.jsonl", [*rows, empty])
    mixed(file, write(tmp_path / "gsm8k.jsonl", [GSM8K | {"id": 3}]))
    told = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert told == [f"{file}: fields that are not read: messages[].reasoning_content, messages[].weight, origin"]


def test_a_repeated_conversation_is_either_trained_on_or_held_out(tmp_path, renderer):
    file = write(tmp_path / "a.jsonl", [chat(f"{i}") for i in range(10)])
    conversations = read_mixture([Source(file, epochs=2.5)], renderer(), 42, "mixture")
    train_set, val_set = split(conversations, 0.3, 42)
    texts = [{ids.tobytes() for ids, _ in part} for part in (train_set, val_set)]
    assert len(val_set) == len(texts[1]) == 3 and len(texts[0]) == 7 and not texts[0] & texts[1]
    assert len(train_set) in range(14, 22)


def test_a_validation_mixture_replaces_the_share(tmp_path, toy_model_and_tokenizer):
    train, val = (write(tmp_path / f"{name}.jsonl", [chat(f"{name}{i}") for i in range(5)]) for name in ("t", "v"))
    own = {"model_name_or_path": "m", "mixture": [train]}
    loop = LoopArguments(max_length=64, total_batch_size=64)
    args = MidtrainArguments(**own, validation_mixture=[{"source": val, "rows": 3}])
    sets = train_and_validation_sets(args, loop, toy_model_and_tokenizer[1], False)
    assert [len(part) for part in sets] == [5, 3]
    sets = train_and_validation_sets(MidtrainArguments(**own), loop, toy_model_and_tokenizer[1], False)
    assert [len(part) for part in sets] == [4, 1]
    with pytest.raises(UserError, match="validation_share has no effect with validation_mixture"):
        MidtrainArguments(**own, validation_mixture=[val], validation_share=0.1)
    with pytest.raises(UserError, match="validation_mixture, entry 1: unknown key"):
        MidtrainArguments(**own, validation_mixture=[{"source": val, "row": 3}])


def test_beginnings_are_checked_without_reading_all(tmp_path):
    good, bad = write(tmp_path / "a.jsonl", [chat("a"), {}]), write(tmp_path / "b.jsonl", [{}])
    check_beginnings([Source(good), Source("later.jsonl")], 1, {"later.jsonl"}, "error")
    for source in (Source(bad), Source(good, format="gsm8k"), Source("spelling_bee", 1, words=f"{tmp_path}/none")):
        with pytest.raises(UserError, match="no `messages`|no file matches"):
            check_beginnings([source], 1, set(), "error")
    check_beginnings([Source(bad)], 1, set(), "skip")
