"""Conversations are the same, whatever kind of file they come from."""

import gzip
import json
import weakref

import numpy as np
import pytest
from datasets import Dataset
from training import render

from modeling_nanochat.errors import UserError
from recipes.training.data import workers
from recipes.training.data.conversations import Renderer, read_conversations

CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "12*7"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": {"type": "object"}}}
]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "12*7?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "python", "content": "84"},
            {"role": "assistant", "content": "84"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "Sun."},
        ],
        "tools": TOOLS,
    },
]
PROBLEM = {"question": "1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        fields = dict.fromkeys(key for row in rows for key in row)
        Dataset.from_list([fields | row for row in rows]).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode("utf-8-sig")))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.json.gz", "folder/train.parquet"])
def test_conversations_of_any_kind_of_file_are_rendered_as_those_of_jsonl(tmp_path, toy_model_and_tokenizer, name):
    _, tokenizer = toy_model_and_tokenizer
    rows = [*CONVERSATIONS, PROBLEM]
    lines, other = write(tmp_path / "lines.jsonl", rows), write(tmp_path / name, rows)
    name = str(tmp_path / "folder") if "folder" in name else other
    expected, found = (render(read_conversations([source]), tokenizer, 999) for source in (lines, name))
    assert len(expected) == len(rows)
    for pair in zip(expected, found, strict=True):
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*pair, strict=True))


def test_a_bad_row_of_a_table_is_named(tmp_path):
    broken = {"messages": [{"role": "assistant", "content": "Hello."}]}
    with pytest.raises(UserError, match=r"a.parquet, row 2, message 1: role 'assistant' is out of order"):
        read_conversations([write(tmp_path / "a.parquet", [CONVERSATIONS[0], broken])])


def test_a_message_of_weight_0_is_not_trained_on(toy_model_and_tokenizer):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes."}
    call = {"function": {"name": "python", "arguments": {"code": "1"}}}
    messages = [
        user, answer | {"content": "wrong", "weight": 0}, user, answer | {"tool_calls": [call], "weight": 1},
        {"role": "tool", "content": "1"}, answer | {"content": "no", "weight": 0.0}, user, answer,
    ]  # fmt: skip
    tokenizer = toy_model_and_tokenizer[1]
    for only_answers in (True, False):
        ((ids, mask),) = Renderer(tokenizer, 999, only_answers)([("here", {"messages": messages})], "x")
        runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)[not mask[0] :: 2]
        trained = [tokenizer.decode(run) for run in runs]
        if only_answers:
            assert trained == ["Yes.<|python_start|>1<|python_end|>", "Yes.<|assistant_end|>"]
        else:
            assert not any(word in text for text in trained for word in ("wrong", "no"))
            assert len(trained) == 3 and trained[0] == "<|user_start|>a<|user_end|><|assistant_start|>"


def test_texts_are_not_kept(toy_model_and_tokenizer):
    class Row(dict):
        pass

    def rows():
        for i in range(50):
            alive[i] = row = Row(CONVERSATIONS[0])
            most.append(len(alive))
            yield "here", row
            del row

    alive, most = weakref.WeakValueDictionary(), []
    assert len(Renderer(toy_model_and_tokenizer[1], 999)(rows(), "x")) == 50
    assert max(most) <= 3


def test_many_records_are_rendered_by_several_processes_as_by_one(toy_model_and_tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(workers, "FEW", 5)
    rows = [*CONVERSATIONS, PROBLEM, {"messages": []}, {"messages": [CONVERSATIONS[0]["messages"][0]], "id": 3}] * 40
    rows += [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x" * 99}]}]
    records = [(f"here:{number}", row) for number, row in enumerate(rows, start=1)]
    found, said = [], []
    for processes in (0, 2):
        renderer = Renderer(toy_model_and_tokenizer[1], 90, on_bad_row="skip")
        renderer.workers = processes
        found.append(renderer(iter(records), "x"))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "left out: 40 rows, first here:5: " in said[0] and "not read: id" in said[0]
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    renderer.on_bad_row = "error"
    with pytest.raises(UserError, match="^here:5: "):
        renderer(iter(records), "x")
