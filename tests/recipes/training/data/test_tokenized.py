"""The cache of token ids: the same rows as without, never from other text, another tokenizer or half a file."""

import gc
import os
import shutil
import threading
from itertools import chain
from types import SimpleNamespace

import pytest
from datasets import Dataset
from test_streams import MAX_LENGTH, texts_of, written

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.texts import text_source
from recipes.training.data import shards as shards_module
from recipes.training.data import tokenized as tokenized_module
from recipes.training.data.streams import TextStreams
from recipes.training.data.tokenized import token_cache
from tokenizer_train.bpe import train_tokenizer

FILES = 66  # enough to be streamed


@pytest.fixture
def tokenizer(toy_model_and_tokenizer):
    return toy_model_and_tokenizer[1]


@pytest.fixture(autouse=True)
def readers_end(hub):
    """No thread of a forgotten stream reads on when the Hub is gone."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        if thread.name == "read ahead":
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def corpus(hub, tmp_path, monkeypatch):
    """The same text on the Hub, where it is streamed, and in a local file."""
    monkeypatch.setattr(shards_module, "BLOCK", 7)
    monkeypatch.setattr(tokenized_module, "BLOCK", 7)
    texts = ["", "the cat " * 300, None, *texts_of(20)]
    files = {f"train-{i:02}.parquet": [text and f"{i} {text}" for text in texts] for i in range(FILES)}
    for name, content in files.items():
        Dataset.from_dict({"text": content}).to_parquet(tmp_path / "corpus" / name)
    hub.put("me/corpus", tmp_path / "corpus", kind="datasets")
    Dataset.from_dict({"text": list(chain(*files.values()))}).to_parquet(tmp_path / "whole.parquet")
    return {"streamed": "me/corpus", "whole": str(tmp_path / "whole.parquet")}


def streams(name, tokenizer, folder=None):
    texts = text_source([name])
    cache = token_cache(folder, texts, [name], tokenizer) if folder else None
    made = TextStreams(texts, tokenizer, MAX_LENGTH, seed=1, threads=1, cache=cache)
    made.fill_cache()
    return made


def rows_of(make_stream, count=250):
    """Of two streams, over more than an epoch."""
    return [written(make_stream(stream), count) for stream in (0, 5)]


def refuse_to_encode(make_stream, monkeypatch):
    monkeypatch.setattr(make_stream.encoder, "encode", lambda texts: pytest.fail("tokenized again"))


@pytest.mark.parametrize("kind", ["streamed", "whole"])
def test_rows_are_those_without_a_cache_and_the_next_run_tokenizes_nothing(
    corpus, tokenizer, tmp_path, monkeypatch, kind
):
    expected = rows_of(streams(corpus[kind], tokenizer))
    assert rows_of(streams(corpus[kind], tokenizer, tmp_path / "cache")) == expected
    again = streams(corpus[kind], tokenizer, tmp_path / "cache")
    refuse_to_encode(again, monkeypatch)
    assert rows_of(again) == expected


@pytest.mark.parametrize("cached_first", [True, False])
def test_a_run_continues_with_or_without_the_cache(corpus, tokenizer, tmp_path, cached_first):
    kinds = [tmp_path / "cache", None] if cached_first else [None, tmp_path / "cache"]
    before, after = (streams(corpus["streamed"], tokenizer, folder) for folder in kinds)
    for count in (3, 40, 120):
        stream = before(3)
        written(stream, count)
        resumed = after(3)
        resumed.load_state_dict(stream.state_dict())
        assert written(resumed, 30) == written(stream, 30)


@pytest.mark.parametrize("kind", ["streamed", "whole"])
def test_a_damaged_file_is_written_again(corpus, tokenizer, tmp_path, kind):
    expected = rows_of(streams(corpus[kind], tokenizer, tmp_path / "cache"))
    files = sorted((tmp_path / "cache").rglob("*.arrow"))
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    assert rows_of(streams(corpus[kind], tokenizer, tmp_path / "cache")) == expected
    assert all(tokenized_module.TokenizedFile(file).blocks for file in files)


def test_an_interrupted_shard_leaves_nothing_that_is_used(corpus, tokenizer, tmp_path):
    cache = streams(corpus["streamed"], tokenizer, tmp_path / "cache").cache
    blocks = cache.keep(iter([[None], [None]]), shard=9)
    next(blocks)
    next(blocks)  # the first is written
    assert cache.open(9) is None and list(cache.folder.glob(".9.*.unfinished"))
    blocks.close()
    assert not list(cache.folder.iterdir())


def test_two_streams_may_write_the_same_shard_at_once(corpus, tokenizer, tmp_path, capsys):
    cache = streams(corpus["streamed"], tokenizer, tmp_path / "cache").cache
    one, other = (cache.keep(iter([[None], [None]]), shard=9) for _ in range(2))
    for blocks in (one, other, one, other):
        next(blocks)
    assert len(list(cache.folder.glob(".9.*.unfinished"))) == 2
    assert (*one, *other) == () and list(cache.open(9).read(0)) == [[None], [None]]
    assert [path.name for path in cache.folder.iterdir()] == ["9.arrow"] and "warning" not in capsys.readouterr().out


def test_what_a_killed_run_left_is_removed_after_a_day(corpus, tokenizer, tmp_path):
    folder = streams(corpus["streamed"], tokenizer, tmp_path / "cache").cache.folder
    for name, age in ((".1.77.unfinished", 90_000), (".2.77.unfinished", 60)):
        (folder / name).write_bytes(b"")
        changed = tokenized_module.time.time() - age
        os.utime(folder / name, (changed, changed))
    streams(corpus["streamed"], tokenizer, tmp_path / "cache")
    assert [path.name for path in folder.iterdir()] == [".2.77.unfinished"]


@pytest.mark.parametrize("kind", ["streamed", "whole"])
def test_a_full_disk_ends_the_cache_not_the_training(corpus, tokenizer, tmp_path, kind, monkeypatch, capsys):
    expected = rows_of(streams(corpus[kind], tokenizer))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert rows_of(streams(corpus[kind], tokenizer, tmp_path / "cache")) == expected
    assert "warning: tokenized_cache: " in (out := capsys.readouterr().out) and "less than 2 GiB" in out
    assert not list((tmp_path / "cache").rglob("*.arrow")) and not list((tmp_path / "cache").rglob("*unfinished"))


def test_another_tokenizer_other_text_or_another_commit_has_its_own_folder(corpus, hub, tokenizer, tmp_path):
    other = train_tokenizer(["another text altogether"], 320, model_max_length=256)
    folders = [
        streams(corpus[kind], using, tmp_path / "cache").cache.folder
        for kind in corpus
        for using in (tokenizer, other)
    ]
    Dataset.from_dict({"text": ["changed"] * 20}).to_parquet(corpus["whole"])
    files = dict(hub.repositories["datasets", "me/corpus"].files)
    hub.put("me/corpus", files | {"README.md": "changed"}, kind="datasets")
    folders += [streams(name, tokenizer, tmp_path / "cache").cache.folder for name in corpus.values()]
    assert len(set(folders)) == 6
    assert streams(corpus["whole"], tokenizer, tmp_path / "cache").cache.folder == folders[-1]


def test_a_folder_that_cannot_be_written_is_one_line(corpus, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^tokenized_cache: .* is not writable .*; give another$"):
        streams(corpus["whole"], tokenizer, tmp_path / "file")
