"""Text from wherever people have it: whole or as a stream, compressed or not, and one line where it is wrong."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest
from datasets import Dataset, IterableDataset

from modeling_nanochat.errors import UserError
from modeling_nanochat.text import sources
from modeling_nanochat.text.sources import is_hub_id, read_texts, text_dataset, text_in_order, text_source

TEXTS = [f"document {i}" for i in range(200)]


def parquet(folder, parts=2):
    for part in range(parts):
        shard = Dataset.from_dict({"text": TEXTS}).shard(parts, part)
        shard.to_parquet(folder / f"{part}.parquet", batch_size=10)  # rows in a row group
    return [str(folder / "*.parquet")]


@pytest.mark.parametrize(("suffix", "opened"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files_are_read(tmp_path, suffix, opened):
    with opened(tmp_path / f"a.jsonl{suffix}", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in ("one", "zwölf"))
    with opened(tmp_path / f"b.txt{suffix}", "wt", encoding="utf-8") as text:
        text.write("three\n\nvier\n")
    texts = text_dataset([str(tmp_path / f"a.jsonl{suffix}"), str(tmp_path / f"b.txt{suffix}")])["text"]
    assert [text.strip() for text in texts] == ["one", "zwölf", "three", "vier"]


def test_few_local_files_are_whole_and_many_gigabytes_are_streamed_by_row_groups(tmp_path, monkeypatch):
    files = parquet(tmp_path)
    whole = text_source(files)
    assert isinstance(whole, Dataset) and whole["text"][:] == TEXTS
    monkeypatch.setattr(sources, "WHOLE_UP_TO", 1000)
    stream = text_source(files)
    assert isinstance(stream, IterableDataset) and stream.num_shards == 20
    assert [row["text"] for row in stream] == TEXTS


@pytest.mark.parametrize(("parts", "kind"), [(70, IterableDataset), (3, Dataset)])
def test_the_hub_is_streamed_where_a_dataset_has_parts_enough(monkeypatch, parts, kind):
    asked = []

    def load_dataset(name, split, streaming=False):
        asked.append((name, split, streaming))
        dataset = Dataset.from_dict({"body": TEXTS, "url": TEXTS})
        return dataset.to_iterable_dataset(num_shards=parts) if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = text_source(["me/corpus:validation"], column="body")
    assert isinstance(texts, kind) and list(next(iter(texts))) == ["text"]
    assert [row["text"] for row in texts] == TEXTS
    assert asked == [("me/corpus", "validation", True), ("me/corpus", "validation", False)][: 1 + (kind is Dataset)]
    with pytest.raises(UserError, match="me/corpus: no column 'text', only body, url"):
        text_source(["me/corpus"])


@pytest.mark.parametrize(
    ("name", "configuration", "split"),
    [
        ("me/corpus", (), "train"),
        ("me/corpus:validation", (), "validation"),
        ("me/corpus:sample-10BT:validation", ("sample-10BT",), "validation"),
        ("me/corpus:sample-10BT:", ("sample-10BT",), "train"),
    ],
)
def test_configuration_and_split_of_a_dataset_on_the_hub(monkeypatch, name, configuration, split):
    """Read in order it is streamed, however few its parts are."""
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_texts(text_in_order([name]), name)) == TEXTS
    assert asked == [("me/corpus", *configuration, {"split": split, "streaming": True})]


def test_a_hub_id_with_too_many_colons_is_told_what_to_write():
    with pytest.raises(UserError, match="write owner/name, owner/name:split or owner/name:configuration:split"):
        text_source(["me/corpus:a:b:c"])


def test_a_stream_that_breaks_is_one_line_with_its_place():
    def rows():
        yield from ({"text": text} for text in TEXTS)
        raise ConnectionError("no route\nto the host")

    read = read_texts(IterableDataset.from_generator(rows), "me/corpus")
    with pytest.raises(UserError, match=r"^me/corpus: reading failed after row \d+ \(no route\)$"):
        list(read)


def test_a_dataset_that_is_not_on_the_hub_is_an_error_of_one_line():
    with pytest.raises(UserError, match="me/none: could not be loaded from the Hub") as caught:
        text_source(["me/none"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["me/corpus", "me/corpus:train", "me/corpus.v2", "me/corpus:config-10BT:train"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["me/a.jsonl", "me/a.jsonl.gz", "me/a.TXT.xz", "./a", "a.parquet", "me/b/c", "me/*", "/a"]
)
def test_paths_are_no_hub_ids(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"text": "x"}\n[1, 2]\n', "a.jsonl:2: expected a JSON object, found list"),
        ('{"text": "x"}\n{oops\n', "a.jsonl:2: not valid JSON"),
        ('\n\n{"body": "x"}\n', "a.jsonl: no column 'text', only body"),
        ('{"text": null}\n{"text": " "}\n', "every document is empty"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("company", [0, 2])
def test_a_bad_file_is_named_also_among_good_ones(tmp_path, lines, words, company):
    for i in range(company):
        (tmp_path / f"{i}.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "a.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(UserError, match=words) as caught:
        text_dataset([str(tmp_path / "*.jsonl")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[5, 6], [{"a": 1}], [["a"]]])
def test_a_column_of_something_else_than_text_is_named(tmp_path, values):
    Dataset.from_dict({"text": values}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: column 'text' holds .* instead of text"):
        text_dataset([str(tmp_path / "a.parquet")])


def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text('{"text": "not compressed"}\n')
    with pytest.raises(UserError, match=r"a.jsonl.gz: cannot be read as json"):
        text_dataset([str(tmp_path / "a.jsonl.gz")])
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"a.parquet: cannot be read as parquet"):
        text_dataset(parquet(tmp_path) + [str(tmp_path / "a.parquet")])


@pytest.fixture(params=["whole", "streamed"])
def read(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(sources, "WHOLE_UP_TO", 0)
    return text_source


def test_parquet_files_may_differ_in_the_columns_that_nobody_needs(tmp_path, read):
    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"url": [7], "text": ["two"]}).to_parquet(tmp_path / "b.parquet")
    assert list(read([str(tmp_path / "*.parquet")])) == [{"text": "one"}, {"text": "two"}]


def test_the_one_parquet_file_without_text_is_named_before_training(tmp_path, read):
    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"body": ["two"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: no column 'text', only body"):
        read([str(tmp_path / "*.parquet")])


def test_no_files_at_all_are_an_error_of_one_line():
    with pytest.raises(UserError, match=r"^train_files: no files given; name at least one$"):
        text_source([], what="train_files")
