"""What people bring and get wrong: every case ends in one line that says what, where and what to do."""

import json
import logging
from dataclasses import dataclass

import pytest
from datasets import Dataset
from training import render

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.text.conversations import check_messages
from modeling_nanochat.text.records import read_jsonl
from modeling_nanochat.text.texts import text_dataset
from recipes.grpo import read_problems
from recipes.training.arguments import LoopArguments
from recipes.training.data.bad_rows import BadRows
from recipes.training.data.chat_templates import render_one
from recipes.training.data.conversations import read_conversations
from recipes.training.setup import make_accelerator


def user(text="Hi"):
    return {"role": "user", "content": text}


def assistant(text="Hello", calls=None):
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})


CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+1"}}}


@pytest.mark.parametrize(
    "messages",
    [
        [user(), assistant()],
        [{"role": "system", "content": "s"}, user(), assistant(), user()],
        [user(), assistant("", [CALL]), {"role": "tool", "name": "python", "content": "2"}, assistant("2")],
        [
            user(),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            assistant(),
        ],
    ],
)
def test_good_conversations_pass(messages):
    check_messages(messages, "here")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        ([assistant()], "message 1: role 'assistant' is out of order"),
        ([user(), user()], "message 2: role 'user' is out of order, expected assistant"),
        ([user(), assistant(), assistant()], "message 3"),
        ([user(), {"role": "tool", "content": "2"}], "message 2: role 'tool' is out of order"),
        ([user(), assistant("", [CALL]), user()], "message 3: role 'user' is out of order, expected tool"),
        ([user(), {"role": "bot", "content": "x"}], "unknown role 'bot'"),
        ([user(), {"role": "assistant", "content": 3}], "`content` must be a string"),
        ([user(), assistant("", [{"function": {"name": "python", "arguments": "{}"}}])], "arguments"),
        ([user(), "Hello"], "role"),
        ([user(), {"role": "assistant", "content": "", "tool_calls": 5}], "`tool_calls` must be a list"),
        ([user(), assistant("", [{"function": "python"}])], "a tool call needs"),
        ([user(), assistant("", ["python"])], "a tool call needs"),
    ],
)
def test_bad_conversations_are_named(messages, words):
    with pytest.raises(UserError, match=words) as caught:
        check_messages(messages, "chat.jsonl:7")
    assert str(caught.value).startswith("chat.jsonl:7") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{nonsense", "not valid JSON"),
        ("[1, 2]", "expected an object with `role`"),
        ("3", "expected a JSON object"),
        ('{"text": "x"}', "messages"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, line, words):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [user(), assistant()]}) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=words) as caught:
        read_conversations([str(path)])
    assert f"{path}:3" in str(caught.value)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        text_dataset([str(tmp_path / "*.parquet")])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        text_dataset([str(tmp_path / "empty.txt")])
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="blank.jsonl is empty"):
        read_conversations([str(tmp_path / "blank.jsonl")])
    with pytest.raises(UserError, match="no such file"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="UTF-8"):
        list(read_jsonl(tmp_path / "bytes.jsonl"))


def test_text_comes_from_parquet_jsonl_and_plain_files(tmp_path):
    Dataset.from_dict({"text": ["one", "two"], "more": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    (tmp_path / "c.txt").write_text("five\nstill five\n\nsix\n")
    texts = text_dataset([str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "c.txt")])["text"]
    assert [text.strip() for text in texts] == ["one", "two", "three", "four", "five\nstill five", "six"]


def test_wrong_columns_kinds_and_broken_files_are_named(tmp_path):
    Dataset.from_dict({"body": ["one"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text', only body"):
        text_dataset([str(tmp_path / "a.parquet")])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="broken.parquet: cannot be read as parquet"):
        text_dataset([str(tmp_path / "broken.parquet")])
    (tmp_path / "book.pdf").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown kind of file"):
        text_dataset([str(tmp_path / "book.pdf")])
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{oops\n')
    with pytest.raises(UserError, match="bad.jsonl:2"):
        text_dataset([str(tmp_path / "bad.jsonl")])


def test_problems_need_a_final_answer(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer": "4"}\n')
    with pytest.raises(UserError, match="problems.jsonl:2"):
        read_problems([str(path)], BadRows())


def test_a_conversation_beyond_the_context_is_counted_without_a_warning_of_the_library(
    toy_model_and_tokenizer, caplog, monkeypatch
):
    """What is left out is reported by `render` itself; transformers would warn of "indexing errors"."""
    _, tokenizer = toy_model_and_tokenizer
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})  # it warns once per tokenizer
    ids, _ = render_one({"messages": [user(), assistant("The cat sat on the mat. " * 100)]}, tokenizer)
    assert len(ids) > tokenizer.model_max_length and not caplog.records


def test_conversations_too_long_are_left_out_and_counted_and_those_without_an_answer_are_named(
    toy_model_and_tokenizer, capsys
):
    _, tokenizer = toy_model_and_tokenizer
    chats = [{"messages": [user("x" * 500), assistant()]}, {"messages": [user(), assistant()]}, {"messages": [user()]}]
    left_out, (ids, mask) = render(chats[:2], tokenizer, 64)
    assert left_out is None and tokenizer.decode(ids[mask]) == "Hello<|assistant_end|>"
    assert "chats: left out: 1 rows, first chats:1: more than max_length 64 tokens\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="^chats:3: no answer of the assistant to train on; add one"):
        render(chats, tokenizer, 64)
    assert [chat is None for chat in render(chats, tokenizer, 64, on_bad_row="skip")] == [True, False, True]
    assert "first chats:3: no answer of the assistant" in capsys.readouterr().out


@dataclass
class Arguments:
    depth: int = 4
    output_dir: str = "out"


@dataclass
class RequiredArguments:
    train_files: list[str]


def test_yaml_and_command_line_fill_the_dataclass(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("depth: 6\noutput_dir: here\n")
    assert parse(Arguments, args=["--config", str(path), "--depth", "8"]) == (Arguments(8, "here"),)
    assert parse(Arguments, args=[f"--config={path}"]) == (Arguments(6, "here"),)


@pytest.mark.parametrize(
    ("content", "words"),
    [("dpeth: 6", "dpeth"), ("- 1", "mapping"), ("depth: [", "not valid YAML"), (None, "no such file")],
)
def test_a_bad_yaml_is_named(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        parse(Arguments, args=["--config", str(path)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_misspelt_required_key_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train_flies: [x]\n")
    with pytest.raises(UserError, match="unknown key 'train_flies', did you mean 'train_files'"):
        parse(RequiredArguments, args=["--config", str(path)])
    with pytest.raises(UserError, match="--train_files"):
        parse(RequiredArguments, args=[])
    with pytest.raises(UserError, match="--depth"):
        parse(Arguments, args=["--depth", "four"])


def test_lists_and_single_values_are_not_mixed_up(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train_files: x.jsonl\n")
    with pytest.raises(UserError, match=r"train_files must be a list, write \[x.jsonl\]"):
        parse(RequiredArguments, args=["--config", str(path)])
    path.write_text("depth: [3]\n")
    with pytest.raises(UserError, match="depth must be a single value"):
        parse(Arguments, args=["--config", str(path)])


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(UserError, match="report_to foo"):
        make_accelerator(LoopArguments(report_to="foo"), str(tmp_path / "base"))


def test_an_unknown_flag_is_refused():
    with pytest.raises(UserError, match="dpeth"):
        parse(Arguments, args=["--dpeth", "6"])


def test_user_errors_are_one_line_and_exit_code_1(capsys):
    def main():
        raise UserError("a.jsonl:3: bad line")

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: a.jsonl:3: bad line\n"
