"""What names stand for: files with any name, folders laid out as on the Hub, and what is said if there is nothing."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import expand, is_hub_id

CONFIGS = """---
configs:
- config_name: chats
  default: true
  data_files:
  - {split: train, path: "chats/*.jsonl"}
  - {split: held_out, path: "held_out/a.jsonl"}
- config_name: problems
  data_files: "problems.json"
---
"""


@pytest.fixture
def folder(tmp_path):
    """A data set with two configurations in `me/chats`, relative to the working directory."""
    folder = tmp_path / "me" / "chats"
    for name in ("chats/a.jsonl", "chats/b.jsonl", "held_out/a.jsonl", "problems.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    (folder / "README.md").write_text(CONFIGS)
    return folder


def parquet(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return str(path)


@pytest.mark.parametrize("name", ["me/corpus", "me/corpus:train", "me/corpus.v2", "me/corpus:config-10BT:train"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["me/a.jsonl", "me/a.jsonl.gz", "me/a.TXT.xz", "./a", "a.parquet", "me/b/c", "me/*", "/a", "~/a"]
)
def test_paths_are_no_hub_ids(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("a[v1].jsonl", ["a[v1].jsonl"]),
        ("b *?.jsonl", ["b *?.jsonl"]),
        ("[ab]*.jsonl", ["a[v1].jsonl", "b *?.jsonl", "b1.jsonl"]),
        ("~/*1.jsonl", ["b1.jsonl"]),
        ("~/b1.jsonl", ["b1.jsonl"]),
        ("c:d.jsonl", ["c:d.jsonl"]),
    ],
)
def test_files_are_found_by_their_name_or_a_pattern(tmp_path, monkeypatch, name, files):
    for file in ("a[v1].jsonl", "b *?.jsonl", "b1.jsonl", "c:d.jsonl"):
        (tmp_path / file).write_text("{}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert [os.path.basename(file) for file in expand([name], "train_files")] == files


@pytest.mark.parametrize(
    ("rest", "files"),
    [
        ("", ["chats/a.jsonl", "chats/b.jsonl"]),
        (":held_out", ["held_out/a.jsonl"]),
        (":chats:held_out", ["held_out/a.jsonl"]),
        (":problems:train", ["problems.json"]),
        (":problems:", ["problems.json"]),
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_folder_stands_for_the_files_of_one_split_even_if_its_name_could_be_a_hub_id(
    folder, monkeypatch, rest, files, relative
):
    monkeypatch.chdir(folder.parent.parent)
    name = f"me/chats{rest}" if relative else f"{folder}{rest}"
    assert not is_hub_id(name)
    assert [os.path.relpath(file, folder) for file in expand([name], "train_files")] == files


def test_a_folder_without_configurations_is_split_by_the_names_of_its_files(tmp_path):
    train, test = (parquet(tmp_path / f"a.parquet/data/{split}-0.parquet", ["x"]) for split in ("train", "test"))
    assert expand([f"{tmp_path}/a.parquet", f"{tmp_path}/a.parquet:test"], "train_files") == [train, test]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("me/chats:nowhere", r"me/chats: no split 'nowhere', only train, held_out; write .*:split"),
        ("me/chats:nothing:train", "me/chats: not a data set as on the Hub .*'nothing' not found.*chats.*problems"),
        ("me/chats/held_ou", "no file matches 'me/chats/held_ou'"),
        ("me", "me: not a data set as on the Hub"),
        ("me/*", "me/chats is a folder; give its files"),
        ("gone.jsonl", "gone.jsonl is a link to a missing file"),
        ("blank.jsonl", "blank.jsonl is empty; fill it or leave it out"),
        ("empty.parquet", "empty.parquet is empty; fill it or leave it out"),
        ("x" * 5000, "no file matches"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(folder, monkeypatch, name, complaint):
    monkeypatch.chdir(folder.parent.parent)
    (folder / "held_out" / "model.bin").write_text("no data")
    os.symlink("nowhere", "gone.jsonl")
    open("blank.jsonl", "w").close()
    parquet(folder.parent.parent / "empty.parquet", [])
    if name == "me":
        for path in (*folder.glob("*/*.jsonl"), folder / "problems.json", folder / "README.md"):
            path.unlink()
    with pytest.raises(UserError, match=complaint) as caught:
        expand([name], "train_files")
    assert "\n" not in str(caught.value)


def test_a_folder_with_several_configurations_lists_them(folder):
    (folder / "README.md").write_text(CONFIGS.replace("  default: true\n", ""))
    with pytest.raises(UserError, match="not a data set as on the Hub .*chats.*problems") as caught:
        expand([str(folder)], "train_files")
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows_among_others_is_skipped_aloud(tmp_path, capsys):
    full, empty = (parquet(tmp_path / f"{name}.parquet", texts) for name, texts in (("a", ["x"]), ("b", [])))
    assert expand([f"{tmp_path}/*.parquet"], "train_files") == expand([empty, full, empty], "train_files") == [full]
    assert capsys.readouterr().out == f"train_files: {empty} has no rows; skipped\n" * 2


def test_no_names_at_all_are_an_error_of_one_line():
    with pytest.raises(UserError, match=r"^train_files: no files given; name at least one$"):
        expand([], "train_files")
