"""A recipe's data from a Hub on this machine: complete, once, and in one line what is in the way."""

import json
import os
import shutil
import sys
from collections import namedtuple
from urllib.error import HTTPError, URLError

import pytest
import yaml
from datasets import Dataset

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.texts import text_source
from recipes import fetch
from recipes.fetching import named, shards

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
PROBLEM = {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
NAMES = [f"shard_{number}.parquet" for number in range(5)]


@pytest.fixture
def corpus(hub, tmp_path, monkeypatch):
    """A data set of five shards on the Hub; no pause lasts."""
    for number, name in enumerate(NAMES):
        texts = [f"Text {number} {row}" for row in range(1 + number)]
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "corpus" / name)
    hub.put("me/corpus", tmp_path / "corpus", kind="datasets")
    monkeypatch.setattr(shards, "sleep", lambda seconds: None)
    return hub


def run(monkeypatch, folder, **settings):
    words = [word for key, value in settings.items() for word in (f"--{key}", *map(str, listed(value)))]
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--output_dir", str(folder), *words])
    fetch.main()


def listed(value):
    return value if isinstance(value, list) else [value]


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def linked(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_shards_are_for_training_and_the_last_for_validation(corpus, monkeypatch, tmp_path, capsys):
    data = tmp_path / "data"
    run(monkeypatch, data, text="me/corpus", train_shards=2)
    assert linked(data / "pretrain" / "train") == NAMES[:2] and linked(data / "pretrain" / "val") == NAMES[4:]
    texts = text_source([str(data / "pretrain" / "train" / "*.parquet")])["text"]
    assert list(texts) == ["Text 0 0", "Text 1 0", "Text 1 1"]
    assert not corpus.sent(NAMES[2]) and "text in 2 + 1 files" in capsys.readouterr().out


def test_nothing_is_downloaded_twice_and_other_numbers_of_shards_leave_no_links_behind(corpus, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=3)
    (tmp_path / "data" / "pretrain" / "train" / "own.parquet").write_bytes(b"mine")
    run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=1)
    run(monkeypatch, tmp_path / "other", text="me/corpus", train_shards=3)
    assert all(len(corpus.sent(name)) == 1 for name in (*NAMES[:3], NAMES[4]))
    assert linked(tmp_path / "data" / "pretrain" / "train") == ["own.parquet", NAMES[0]]


def test_what_a_broken_connection_or_a_busy_hub_cost_is_downloaded_again(corpus, monkeypatch, tmp_path, capsys):
    corpus.fail(f"GET .*{NAMES[0]}", 503, times=2)
    corpus.fail(f"HEAD .*{NAMES[1]}", 429, times=3)
    corpus.cut(f"GET .*{NAMES[4]}", keep=100, times=7)
    run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=2)
    assert "again in 1 s" in capsys.readouterr().out
    for name in (*NAMES[:2], NAMES[4]):
        (found,) = (tmp_path / "data" / "pretrain").glob(f"*/{name}")
        assert found.read_bytes() == (tmp_path / "corpus" / name).read_bytes()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda hub: hub.fail(f"(GET|HEAD) .*{NAMES[1]}", 500, times=999),
            f"{NAMES[1]}: .*internal error .status 500.",
        ),
        (lambda hub: hub.fail("/api/datasets", 500, times=999), "me/corpus: the Hub had an internal error"),
        (lambda hub: hub.put("me/corpus", dict.fromkeys(NAMES, b""), kind="datasets", gated=True), "on request only"),
        (lambda hub: hub.repositories.clear(), "me/corpus: no such data set on the Hub"),
        (lambda hub: hub.put("me/corpus", {"a.txt": "text"}, kind="datasets"), "me/corpus: no parquet files"),
        (lambda hub: hub.put("me/corpus", {"a.parquet": b""}, kind="datasets"), "has 1 parquet files, fewer than"),
    ],
)
def test_a_hub_that_does_not_serve_is_one_line_and_the_same_command_goes_on(
    corpus, monkeypatch, tmp_path, spoil, complaint
):
    spoil(corpus)
    with pytest.raises(UserError, match=complaint) as error:
        run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=2)
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()
    corpus.faults.clear()
    corpus.put("me/corpus", tmp_path / "corpus", kind="datasets")
    run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=2)
    assert linked(tmp_path / "data" / "pretrain" / "train") == NAMES[:2]


def test_without_a_network_it_says_so(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="text me/corpus: HF_HUB_OFFLINE forbids") as error:
        run(monkeypatch, tmp_path / "data", text="me/corpus")
    assert "\n" not in str(error.value)


def test_a_disk_that_is_too_small_is_reported_before_anything_arrives(corpus, monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100))
    with pytest.raises(UserError, match=r"train_shards: 0.0 GB are still .* 0.0 GB are free; lower train_shards"):
        run(monkeypatch, tmp_path / "data", text="me/corpus")
    assert not any(corpus.sent(name) for name in NAMES)


def test_a_disk_that_is_full_midway_is_one_line_and_what_arrived_stays(corpus, monkeypatch, tmp_path):
    download = shards.hf_hub_download

    def full_at_the_last(repository, name, **options):
        if name == NAMES[4]:
            raise OSError(28, "No space left on device")
        return download(repository, name, **options)

    monkeypatch.setattr(shards, "hf_hub_download", full_at_the_last)
    with pytest.raises(UserError, match="GB are still to be downloaded .* lower train_shards, or set HF_HOME"):
        run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=2, workers=1)
    monkeypatch.setattr(shards, "hf_hub_download", download)
    run(monkeypatch, tmp_path / "data", text="me/corpus", train_shards=2)
    assert [len(corpus.sent(name)) for name in NAMES] == [1, 1, 0, 0, 1]


def test_the_persona_becomes_conversations_of_its_name(monkeypatch, tmp_path):
    persona = yaml.safe_load(open("recipes/identity.yaml")) | {"name": "Pebble"}
    run(monkeypatch, tmp_path / "data", persona=write_yaml(tmp_path / "me.yaml", persona))
    lines = (tmp_path / "data" / "identity.jsonl").read_text().splitlines()
    assert len(lines) == 1000 and json.loads(lines[0])["messages"][0]["role"] == "user"
    assert "Pebble" in "".join(lines) and not (tmp_path / "data" / "pretrain").exists()


@pytest.fixture
def recipe(hub, tmp_path, monkeypatch):
    """The YAMLs of a recipe, whose data sets are on the Hub; its list of words and CORE's tasks are published."""
    for name, rows in (("chats", [CHAT] * 3), ("sums", [PROBLEM] * 2), ("more", [CHAT])):
        hub.put(f"me/{name}", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}, kind="datasets")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "words.txt").write_text("lamp\nboat\n")
    monkeypatch.setattr(named, "downloaded", lambda *_: tmp_path / "published")
    monkeypatch.setattr(named, "core_folder", lambda source: tmp_path / "published")
    identity = {"source": "runs/x/data/identity.jsonl", "epochs": 2}
    spelling = {"source": "simple_spelling", "words": "runs/x/data/words.txt", "rows": 5}
    contents = {
        "pretrain": {"train_files": ["me/text"], "core_dir": "runs/x/data/core"},
        "midtrain": {"model_name_or_path": "runs/x/base", "mixture": ["me/chats", "me/sums", identity, spelling]},
        "sft": {"model_name_or_path": "runs/x/mid", "train_files": ["me/chats"], "eval_tasks": ["gsm8k=me/sums"]},
        "grpo": {"model_name_or_path": "runs/x/sft", "train_files": ["me/sums"], "eval_files": ["me/sums"]},
        "eval": {"model_name_or_path": "runs/x/sft", "tasks": ["gsm8k=me/sums", "core", "own=runs/x/data/own.jsonl"]},
    }
    return {name: write_yaml(tmp_path / f"{name}.yaml", content) for name, content in contents.items()}


def test_all_that_the_yamls_name_is_in_the_cache_afterwards(recipe, hub, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path / "data", configs=list(recipe.values()))
    said = capsys.readouterr().out
    assert said.count("me/chats: 3 rows") == said.count("me/sums: 2 rows") == 1 and "gsm8k: 2 questions" in said
    assert len(hub.sent("train.jsonl")) == 2  # of each data set once
    assert (tmp_path / "data" / "words.txt").read_text() == "lamp\nboat\n"
    assert os.path.samefile(tmp_path / "data" / "core", tmp_path / "published")


def test_a_data_set_that_is_missing_is_named_before_the_text_arrives(recipe, corpus, monkeypatch, tmp_path):
    del corpus.repositories["datasets", "me/chats"]
    with pytest.raises(UserError, match="me/chats: no local file or folder, and no such data set on the Hub"):
        run(monkeypatch, tmp_path / "data", text="me/corpus", configs=list(recipe.values()))
    assert not any(corpus.sent(name) for name in NAMES)


def test_a_yaml_that_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read"):
        run(monkeypatch, tmp_path / "data", configs=["nowhere.yaml"])


@pytest.mark.parametrize("setting", ["train_shards", "val_shards", "workers"])
def test_numbers_out_of_range_are_refused(monkeypatch, tmp_path, setting):
    with pytest.raises(UserError, match=f"{setting}: is -1"):
        run(monkeypatch, tmp_path / "data", **{setting: -1})


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (URLError("no route"), True),
        (HTTPError("http://host", 503, "busy", None, None), True),
        (HTTPError("http://host", 404, "gone", None, None), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(monkeypatch, error, again):
    monkeypatch.setattr(shards.constants, "HF_HUB_OFFLINE", False)
    wrapped = UserError("core: could not be downloaded")
    wrapped.__cause__ = error
    assert shards.may_pass(wrapped) is again
