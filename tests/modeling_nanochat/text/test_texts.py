"""Text from wherever people have it: whole or as a stream, compressed or not, and one line where it is wrong."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub import constants

from modeling_nanochat.errors import UserError
from modeling_nanochat.text import sources, texts
from modeling_nanochat.text.texts import check_text_files, read_texts, text_dataset, text_in_order, text_source

TEXTS = [f"document {i}" for i in range(200)]


def parquet(folder, parts=2):
    for part in range(parts):
        shard = Dataset.from_dict({"text": TEXTS}).shard(parts, part)
        shard.to_parquet(folder / f"{part}.parquet", batch_size=10)  # rows in a row group
    return [str(folder / "*.parquet")]


@pytest.fixture
def corpus(hub, tmp_path):
    """Puts `me/corpus` on the Hub: a parquet file per split with row groups of so many rows."""

    def put(rows, split="train", **columns):
        folder = tmp_path / "on_the_hub"
        Dataset.from_dict(columns or {"text": TEXTS}).to_parquet(folder / f"{split}.parquet", batch_size=rows)
        hub.put("me/corpus", folder, kind="datasets")

    return put


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
    monkeypatch.setattr(texts, "WHOLE_UP_TO", 1000)
    stream = text_source(files)
    assert isinstance(stream, IterableDataset) and stream.num_shards == 20
    assert [row["text"] for row in stream] == TEXTS


@pytest.mark.parametrize(("rows", "kind"), [(2, IterableDataset), (50, Dataset)])
def test_the_hub_is_streamed_where_a_dataset_has_row_groups_enough(hub, corpus, rows, kind):
    corpus(rows, "validation", body=TEXTS, url=TEXTS)
    opened = text_source(["me/corpus:validation"], column="body")
    assert isinstance(opened, kind) and list(next(iter(opened))) == ["text"]
    assert [row["text"] for row in opened] == TEXTS
    assert any(not request.range for request in hub.sent("validation.parquet")) == (kind is Dataset)
    with pytest.raises(UserError, match="me/corpus:validation: no column 'text', only body, url"):
        text_source(["me/corpus:validation"])


@pytest.mark.parametrize(
    ("name", "read"),
    [("me/corpus", 0), ("me/corpus:validation", 1), ("me/corpus:10BT:validation", 3), ("me/corpus:10BT:", 2)],
)
def test_configuration_and_split_of_a_dataset_on_the_hub(hub, name, read):
    """Read in order it is streamed, however few its parts are."""
    files = [("all", "train"), ("all", "validation"), ("10BT", "train"), ("10BT", "validation")]
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}.jsonl"} for _, s in files[:2]]}
        for name in ("all", "10BT")
    ]
    configs[0]["default"] = True
    contents = {f"{config}/{split}.jsonl": json.dumps({"text": f"{config} {split}"}) + "\n" for config, split in files}
    hub.put("me/corpus", {"README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n"} | contents, kind="datasets")
    assert list(read_texts(text_in_order([name]), name)) == [" ".join(files[read])]
    assert all(request.range for path in contents for request in hub.sent(path))


def test_a_hub_id_with_too_many_colons_is_told_what_to_write():
    with pytest.raises(UserError, match="write owner/name, owner/name:split or owner/name:configuration:split"):
        text_source(["me/corpus:a:b:c"])


def test_a_stream_that_breaks_is_one_line_with_its_place(hub, corpus):
    corpus(2)
    stream = text_in_order(["me/corpus"])
    hub.cut("GET .*train.parquet", keep=200, times=99)
    with pytest.raises(UserError, match=r"^me/corpus: reading failed after row \d+: the connection to .*; check"):
        list(read_texts(stream, "me/corpus"))


@pytest.mark.parametrize("read", [text_source, text_in_order])
def test_a_connection_that_breaks_while_opening_is_one_line(hub, read):
    hub.put("me/corpus", {"a.jsonl": '{"text": "x"}\n' * 99}, kind="datasets")  # no schema before the first row
    hub.cut("GET .*a.jsonl", keep=20, times=99)
    with pytest.raises(UserError, match=r"^me/corpus: no local file or folder, and the connection to .*; check"):
        read(["me/corpus"])


@pytest.mark.parametrize("silent", ["/tree/", "GET .*parquet"])
@pytest.mark.parametrize("read", [text_source, text_in_order])
def test_a_hub_that_takes_connections_and_never_answers_is_one_line(hub, corpus, monkeypatch, silent, read):
    corpus(2)
    monkeypatch.setattr(sources, "SECONDS_TO_ANSWER", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.silence(silent)
    with pytest.raises(UserError, match=r"^me/corpus: no local file or folder, and the connection to .*; check"):
        read(["me/corpus"])
    assert any(fault.seen for fault in hub.faults)


def test_a_dataset_that_is_not_on_the_hub_is_an_error_of_one_line(hub):
    with pytest.raises(
        UserError, match="^me/none: no local file or folder, and no such data set on the Hub"
    ) as caught:
        text_source(["me/none"])
    assert "\n" not in str(caught.value)


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
        monkeypatch.setattr(texts, "WHOLE_UP_TO", 0)
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


def test_a_byte_order_mark_is_no_character_of_the_text(tmp_path, read):
    (tmp_path / "a.txt").write_text("one\r\n\r\ntwo", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("three", encoding="utf-8-sig")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n')
    (tmp_path / "d.json").write_text('[{"text": "five"},\n{"text": "six"}]', encoding="utf-8-sig")
    (tmp_path / "e.JSONL").write_text('{"text": "seven"}\n', encoding="utf-8-sig")
    texts = read([str(tmp_path / "*")])
    assert [row["text"] for row in texts] == ["one", "two", "three", "four", "five", "six", "seven"]


def test_names_with_brackets_are_no_patterns(tmp_path, read):
    for name in ("a[v1].txt", "a1.txt", "av.txt"):
        (tmp_path / name).write_text(name)
    assert [row["text"] for row in read([str(tmp_path / "a[v1].txt")])] == ["a[v1].txt"]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_every_type_of_text_is_read_alone_and_with_others(tmp_path, read, kind):
    (tmp_path / "b.txt").write_text("three")
    pq.write_table(pa.table({"text": pa.array(["one", "two"]).cast(kind)}), tmp_path / "a.parquet")
    assert list(read_texts(read([str(tmp_path / "a.parquet")]), "a")) == ["one", "two"]
    assert list(read_texts(read([str(tmp_path / "*")]), "all")) == ["one", "two", "three"]


def test_empty_shards_and_row_groups_are_skipped(tmp_path, read, capsys):
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pq.ParquetWriter(tmp_path / "b.parquet", schema) as file:
        for rows in ([], TEXTS[:150], [], TEXTS[150:]):
            file.write_table(pa.table({"text": pa.array(rows, pa.string())}))
    assert [row["text"] for row in read([str(tmp_path / "*.parquet")])] == TEXTS
    assert "a.parquet has no rows; skipped" in capsys.readouterr().out


def test_other_fields_of_json_files_need_not_match(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "meta": [1]}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two", "meta": "x"}\n')
    assert text_dataset([str(tmp_path / "*.jsonl")])["text"][:] == ["one", "two"]


def test_a_folder_as_the_hub_has_it_is_read_by_split(tmp_path, read):
    for split, rows in (("train", TEXTS), ("test", ["held out"])):
        Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert [row["text"] for row in read([str(tmp_path)])] == TEXTS
    assert [row["text"] for row in read([f"{tmp_path}:test"])] == ["held out"]


@pytest.mark.parametrize(("rows", "kind"), [(2, IterableDataset), (50, Dataset)])
def test_the_hub_and_files_may_be_mixed_and_are_streamed_together(tmp_path, corpus, rows, kind):
    corpus(rows)
    pq.write_table(pa.table({"text": pa.array(["one", "two"], pa.large_string())}), tmp_path / "a.parquet")
    names = [str(tmp_path / "a.parquet"), "me/corpus", str(tmp_path / "a.parquet")]
    source = text_source(names)
    assert isinstance(source, kind) and list(read_texts(source, "names")) == ["one", "two", *TEXTS, "one", "two"]
    assert list(read_texts(text_in_order(names), "names")) == ["one", "two", *TEXTS, "one", "two"]
    assert isinstance(text_in_order(names), IterableDataset) and isinstance(text_dataset(names), Dataset)


def test_compression_that_needs_a_package_is_told_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("fsspec.compression.available_compressions", lambda: ["gzip"])
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(UserError, match="a.txt.zst: text in .zst files needs .*pip install zstandard"):
        check_text_files([str(tmp_path / "a.txt.zst")], "train_files")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "dark night".encode("utf-16"), "a.txt: not UTF-8 text"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "cut o', "a.jsonl:2: not valid JSON .*Unterminated"),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"[" * 9000, "a.jsonl:2: not readable as JSON .*recursion"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "a.jsonl:1: not readable as JSON"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"}\n', "a.json:3: not valid JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9999, mtime=0)[:-9],
            "a.jsonl.gz: cannot be read as json .*ended",
        ),
        ("a.jsonl", b'{"text": "x"}\n\0\0\0\0', "a.jsonl:2: not valid JSON"),
        ("a.txt", b" \n\n", "no text in .*a.txt; every document is empty"),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        text_dataset([str(tmp_path / name)])
    assert "\n" not in str(caught.value)
