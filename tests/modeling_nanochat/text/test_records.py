"""Records from wherever people have them, with the place of each, and one line where something is wrong."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List
from huggingface_hub import constants

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_jsonl, read_records

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hellö."}]
ROWS = [{"n": i} for i in range(5)]


def read(*names, **options):
    return list(read_records([str(name) for name in names], "train_files", **options))


def lines(rows, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def zst(path, mode):
    return pa.output_stream(path, compression="zstd")


CONFIGS = """---
configs:
- config_name: few
  default: true
  data_files: [{split: train, path: few.jsonl}]
- config_name: many
  data_files: [{split: train, path: "many/*.jsonl"}]
---
"""
LOST = "the connection to the Hub failed .*; check the network and run the same command again"


@pytest.fixture
def rows(hub):
    """`me/rows`, a data set with three rows in one configuration and two files of 100 rows in the other."""
    few = [{"n": 0, "more": {"x": 1}}, {"n": 1, "more": {"y": [None]}}, {"n": 2}]
    many = {
        f"many/{i}.jsonl": lines({"n": n, "text": "x" * 500} for n in range(100 * i, 100 * i + 100)) for i in (0, 1)
    }
    hub.put("me/rows", {"README.md": CONFIGS, "few.jsonl": lines(few), **many}, kind="datasets")


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("a.jsonl", open),
        ("a.JSONL", open),
        ("a.json", open),
        ("a[v1].jsonl", open),
        ("a.jsonl.gz", gzip.open),
        ("a.json.bz2", bz2.open),
        ("a.jsonl.XZ", lzma.open),
        ("a.jsonl.zst", zst),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lines_are_read_from_any_file_with_the_line(tmp_path, name, opened, encoding):
    with opened(str(tmp_path / name), "wb") as file:
        file.write(("\n" + lines([{"a": "ö"}, {"a": "\u2028"}], end="\r\n\r\n")).encode(encoding))
    path = tmp_path / name
    assert read(path) == [(f"{path}:2", {"a": "ö"}), (f"{path}:4", {"a": "\u2028"})]
    assert [record for _, record in read_jsonl(path)] == [{"a": "ö"}, {"a": "\u2028"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz"])
def test_a_file_may_be_one_array_of_records(tmp_path, indent, encoding, suffix):
    path = tmp_path / f"a.{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as file:
        file.write(json.dumps(ROWS, indent=indent).encode(encoding))
    assert read(path) == [(f"{path}, record {i + 1}", row) for i, row in enumerate(ROWS)]
    assert read(path, first=2) == read(path)[:2]


def test_an_array_of_messages_is_one_conversation_in_a_line_a_file_or_an_array(tmp_path):
    contents = {
        "lines": lines([MESSAGES, MESSAGES]),
        "array": json.dumps([MESSAGES, MESSAGES]),
        "indented": json.dumps([MESSAGES, MESSAGES], indent=1),
        "single": json.dumps(MESSAGES, indent=1),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.json"
        path.write_text(content)
        expected = [{"messages": MESSAGES}] * (1 if name == "single" else 2)
        assert [record for _, record in read(path, arrays_are="messages")] == expected
        with pytest.raises(UserError, match="expected a JSON object, found list"):
            read(path)


def test_parquet_rows_are_read_without_the_fields_that_only_other_rows_have(tmp_path):
    call = {"function": {"name": "f", "arguments": {"code": None, "x": 1}}}
    rows = [{"messages": MESSAGES}, {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    del call["function"]["arguments"]["code"]
    assert read(tmp_path / "a.parquet") == [(f"{tmp_path}/a.parquet, row {i + 1}", row) for i, row in enumerate(rows)]


def test_parquet_columns_of_json_and_of_string_views_are_read(tmp_path):
    features = Features({"messages": List(Json())})
    Dataset.from_dict({"messages": [MESSAGES]}, features=features).to_parquet(tmp_path / "a.parquet")
    views = pa.list_(pa.struct([("role", pa.string_view()), ("content", pa.string_view())]))
    pq.write_table(pa.table({"messages": pa.array([MESSAGES], views)}), tmp_path / "b.parquet")
    assert [record for _, record in read(tmp_path / "*.parquet")] == [{"messages": MESSAGES}] * 2


def test_empty_row_groups_are_skipped(tmp_path):
    schema = pa.schema([("n", pa.int64())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as file:
        for rows in ([], ROWS[:2], [], ROWS[2:]):
            file.write_table(pa.Table.from_pylist(rows, schema))
    assert [record for _, record in read(tmp_path / "a.parquet")] == ROWS


def test_sources_of_all_kinds_are_read_in_their_order(tmp_path, rows):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "b" / "data" / "test-0.parquet")
    (tmp_path / "a.json").write_text(lines(ROWS))
    found = read(tmp_path / "a.json", "me/rows:few:train", f"{tmp_path}/b:test", tmp_path / "a.json", first=2)
    hub_rows = [{"n": 0, "more": {"x": 1}}, {"n": 1, "more": {"y": [None]}}]
    assert [record for _, record in found] == [*ROWS[:2], *hub_rows, *ROWS[:2], *ROWS[:2]]
    assert [where for where, _ in found[1:4]] == [f"{tmp_path}/a.json:2"] + [
        f"me/rows:few:train, row {i}" for i in (1, 2)
    ]


@pytest.mark.parametrize(("first", "streamed"), [(2, True), (None, False), (9, True)])
def test_the_hub_is_streamed_to_read_little_and_downloaded_to_read_all(hub, rows, first, streamed):
    assert [record["n"] for _, record in read("me/rows", first=first)] == [0, 1, 2][:first]
    assert {bool(request.range) for request in hub.sent("few.jsonl")} == {streamed}


def test_what_was_downloaded_before_is_read_offline(hub, rows, monkeypatch):
    read("me/rows")
    hub.requests.clear()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert [record["n"] for _, record in read("me/rows", first=2)] == [0, 1] and not hub.requests


def test_the_hub_out_of_reach_is_one_short_line():
    with pytest.raises(
        UserError, match="me/none: no local file or folder, and HF_HUB_OFFLINE forbids .*; unset the"
    ) as caught:
        read("me/none")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/none", "no such data set on the Hub that you can read; correct the name, or log in with `hf auth login`"),
        ("me/closed", "the Hub gives this data set on request only; ask for it on its page, and log in with `hf auth"),
        ("me/röws", "not a Hub id: letters, digits, `-`, `_` and `.` only"),
        ("me/rows:dev", r"cannot be opened .*dev.*'train'.*; write me/rows:split or me/rows:configuration:split"),
        ("me/rows:few:dev", r"cannot be opened .*dev.*'train'.*; write me/rows:split or me/rows:configuration:split"),
        ("me/rows:all:train", r"cannot be opened .*'all' not found.*'few', 'many'.*; write me/rows:split or"),
        ("me/empty", "me/empty: cannot be opened .*; correct its files or give another data set"),
    ],
)
@pytest.mark.parametrize("first", [5, None])
@pytest.mark.parametrize("token", ["hf_test", None])
def test_what_the_hub_does_not_have_is_one_line(hub, rows, monkeypatch, name, said, first, token):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    hub.put("me/closed", {"a.jsonl": lines(ROWS)}, kind="datasets", gated=True)
    hub.put("me/empty", {"README.md": "nothing"}, kind="datasets")
    with pytest.raises(UserError, match=f"^{name}: .*{said}" if ":" in name else said) as caught:
        read(name, first=first)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda hub: hub.cut("GET .*many/1.jsonl", keep=9999, times=99), LOST),
        (lambda hub: hub.fail("GET .*many/1.jsonl", 500, times=99), "the Hub had an internal error .status 500.; run"),
        (lambda hub: hub.fail("GET .*many/1.jsonl", 429, times=99, Retry_After="3"), "the Hub limits your requests"),
        (lambda hub: hub.fail("GET .*many/1.jsonl", 401, times=99), "the Hub does not accept your token; log in"),
    ],
)
def test_a_connection_that_breaks_is_one_line_and_the_second_try_keeps_whole_files(hub, rows, break_it, said):
    break_it(hub)
    with pytest.raises(UserError, match=rf"^me/rows:many:train: reading failed after row 100: {said}") as caught:
        read("me/rows:many:train", first=999)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^me/rows: no local file or folder, and {said}"):
        read("me/rows:many:train")
    hub.faults.clear()
    hub.requests.clear()
    assert [record["n"] for _, record in read("me/rows:many:train")] == list(range(200))
    assert len(hub.sent("many/1.jsonl")) == 1 and not hub.sent("many/0.jsonl")


@pytest.mark.parametrize("first", [999, None])
def test_a_connection_that_breaks_once_loses_and_repeats_no_row(hub, rows, first):
    hub.cut("GET .*many/1.jsonl", keep=9999)
    hub.fail("GET .*many/0.jsonl", 429, Retry_After="3")
    assert [record["n"] for _, record in read("me/rows:many:train", first=first)] == list(range(200))
    assert 4 in hub.waits


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"n": 1}\n{"n": ' + "1" * 5000 + "}\n", "a.jsonl:2: not readable as JSON .*4300"),
        (
            "a.jsonl",
            '{"n": 1}\n{"n": ' + "[" * 9000 + "]" * 9000 + "}\n",
            "a.jsonl:2: not readable as JSON .*recursion",
        ),
        ("a.jsonl", "[" * 9000 + "]" * 9000, "a.jsonl: not readable as JSON .*recursion"),
        ("a.json", '[{"n": ' + "1" * 5000 + "}]", "a.json: not readable as JSON"),
        ("a.jsonl", '{"n": 1}\n{"n": "cut o', "a.jsonl:2: not valid JSON .*Unterminated string"),
        ("a.jsonl", '{"n": 1}\n\0\0\0\0', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", "It was a dark night.\n", "a.jsonl:1: not valid JSON"),
        ("a.json", '[{"n": 1},\n{"n": 2}\n', "a.json:3: not valid JSON"),
        ("a.json", '[{"n": 1}]\n[{"n": 2}]\n', "a.json:2: not valid JSON .*Extra data"),
        ("a.json", '[{"n": 1}, 2]', "a.json, record 2: expected a JSON object, found int"),
        ("a.json", '{\n "n": 1\n}', "a.json:1: not valid JSON"),
        ("a.jsonl", '{"n": "ö"}\n'.encode("utf-16"), "a.jsonl: not UTF-8 text"),
        ("a.jsonl", b'{"n": 1}\n' * 9999 + b'{"n": "\xff"}\n', "a.jsonl: not UTF-8 text"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(ROWS).encode(), mtime=0)[:-9],
            "a.jsonl.gz: cannot be read as json .*ended before",
        ),
        ("a.jsonl.gz", '{"n": 1}\n', "a.jsonl.gz: cannot be read as json"),
        ("a.jsonl.zst", '{"n": 1}\n', "a.jsonl.zst: cannot be read as json"),
        ("a.parquet", "PAR1 but no more", "a.parquet: cannot be read as parquet"),
        ("a.txt", "It was a dark night.\n", "a.txt is text without fields; give JSONL"),
        ("a.csv", "n\n1\n", "a.csv: unknown kind of file; use .json, .jsonl, .parquet, .txt"),
        ("a.jsonl", "\n \r\n", "train_files: .*a.jsonl is empty; fill it or leave it out"),
        ("a.json", "[]", "train_files: .*a.json is empty; fill it or leave it out"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "train_files: .*a.jsonl.gz is empty"),
    ],
)
def test_a_bad_file_is_named_in_one_line_after_what_could_be_read(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
