"""StreamMaker: every document once an epoch, rows that depend on the data alone, states that continue exactly."""

import json
from itertools import islice, pairwise

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_dataset

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.texts import read_all
from modeling_nanochat.tokenization_nanochat import encode_documents
from recipes.training.data import shards as shards_module
from recipes.training.data import streams as streams_module
from recipes.training.data.documents import Epochs, StreamedDocuments, StridedSampler, out_of_reach
from recipes.training.data.packing import IGNORED
from recipes.training.data.shards import TextShards
from recipes.training.data.streams import STREAMS, ConversationStreams, MixedStreams, TextStreams

MAX_LENGTH = 32
IN_PART = 20  # documents in a part of the stream


@pytest.fixture
def tokenizer(toy_model_and_tokenizer):
    return toy_model_and_tokenizer[1]


def texts_of(count):
    return [f"{i} " + "the cat sat on the mat " * (i % 7) for i in range(count)]


def written(stream, count):
    rows = []
    for _ in range(count):
        row = {"input_ids": np.full(MAX_LENGTH + 1, -1), "labels": np.full(MAX_LENGTH + 1, -1)}
        stream.write(row)
        rows.append({name: values.tolist() for name, values in row.items()})
    return rows


def conversations(count):
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, MAX_LENGTH, count)
    return [(np.array([900, *([i] * (n - 1))]), np.array([0, *([1] * (n - 2)), 0])) for i, n in enumerate(sizes)]


@pytest.fixture(scope="module")
def part_files(tmp_path_factory):
    """22 parquet files of 20 documents, that is 22 parts of a dataset."""
    folder = tmp_path_factory.mktemp("parts")
    for part in range(22):
        texts = [f"part {part} document {i} " + "the cat " * ((part + i) % 9) for i in range(IN_PART)]
        Dataset.from_dict({"text": texts}).to_parquet(folder / f"{part:02}.parquet")
    return sorted(map(str, folder.glob("*.parquet")))


@pytest.mark.parametrize("count", [3, 16, 100, 1000])
def test_every_document_comes_once_an_epoch(count):
    epochs = Epochs(count, seed=5)
    taken = [StridedSampler(epochs, stream, STREAMS).take(2 * count // STREAMS + 1) for stream in range(STREAMS)]
    in_order = [index for together in zip(*taken, strict=True) for index in together]
    assert sorted(in_order[:count]) == sorted(in_order[count : 2 * count]) == list(range(count))
    assert count == 3 or in_order[:count] != in_order[count : 2 * count]


def test_an_epoch_is_shuffled_as_datasets_shuffles():
    texts = Dataset.from_dict({"text": texts_of(50)})
    for epoch in range(2):
        assert texts.shuffle(seed=7 + epoch)["text"][:] == [texts[int(i)]["text"] for i in Epochs(50, 7).order(epoch)]


def test_rows_are_made_of_the_tokenizers_ids(tokenizer):
    texts = texts_of(200)
    beginnings = {tuple(ids[:n]) for ids in encode_documents(tokenizer, texts) for n in range(1, len(ids) + 1)}
    streams = TextStreams(Dataset.from_dict({"text": texts}), tokenizer, MAX_LENGTH)
    bos = tokenizer.bos_token_id
    for stream in (0, 3, 15):
        for row in written(streams(stream), 30):
            ids = row["input_ids"]
            starts = [i for i, token in enumerate(ids) if token == bos] + [len(ids)]
            assert starts[0] == 0 and row["labels"] == ids
            assert all(tuple(ids[a:b]) in beginnings for a, b in pairwise(starts))


def make_stream_each_kind(tokenizer, part_files):
    texts = TextStreams(Dataset.from_dict({"text": texts_of(60)}), tokenizer, MAX_LENGTH, seed=1)
    dataset = load_dataset("parquet", data_files=part_files, split="train", streaming=True)
    spoken = ConversationStreams(conversations(50), tokenizer.pad_token_id, MAX_LENGTH, seed=1)
    return {
        "text": texts,
        "stream": TextStreams(dataset, tokenizer, MAX_LENGTH, seed=1),
        "dataset of few parts": TextStreams(few_parts(part_files), tokenizer, MAX_LENGTH, seed=1),
        "conversations": spoken,
        "mixed": MixedStreams(spoken, texts, replay_every=2),
    }


def few_parts(part_files):
    return load_dataset("parquet", data_files=part_files[:3], split="train", streaming=True)


@pytest.mark.parametrize("kind", ["text", "stream", "dataset of few parts", "conversations", "mixed"])
def test_a_restored_lane_continues_exactly(tokenizer, part_files, kind, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 7)  # that blocks end within parts
    streams = make_stream_each_kind(tokenizer, part_files)[kind]
    stream = streams(3)
    for before in (0, 1, 37, 150):
        written(stream, before)
        state = {name: array.copy() for name, array in stream.state_dict().items()}
        restored = streams(3)
        restored.load_state_dict(state)
        assert restored.rows == stream.rows
        assert written(restored, 40) == written(stream, 40)


@pytest.mark.parametrize("kind", ["text", "stream", "conversations"])
def test_lanes_differ_and_seeds_do(tokenizer, part_files, kind):
    streams = make_stream_each_kind(tokenizer, part_files)[kind]
    assert written(streams(0), 5) == written(streams(0), 5) != written(streams(1), 5)
    other = make_stream_each_kind(tokenizer, part_files)[kind]
    other.seed = 2
    assert written(other(0), 5) != written(streams(0), 5)


def first_epoch(dataset, stream, epochs=1):
    documents, texts = StreamedDocuments(TextShards(dataset), stream, STREAMS, seed=3), []
    for chosen in documents:
        if documents.position.epoch >= epochs:
            return texts
        texts += chosen


@pytest.mark.parametrize("parts", [22, 3])
def test_a_stream_gives_every_document_once_an_epoch(part_files, parts):
    dataset = load_dataset("parquet", data_files=part_files[:parts], split="train", streaming=True)
    texts = [text for stream in range(STREAMS) for text in first_epoch(dataset, stream)]
    expected = load_dataset("parquet", data_files=part_files[:parts], split="train")["text"][:]
    assert sorted(texts) == sorted(expected) and texts != expected


def test_streams_of_parquet_compressed_json_and_text_are_one(tmp_path, part_files):
    import gzip

    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": f"line {i}"}) + "\n" for i in range(40))
    (tmp_path / "b.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(40)))
    names = [*part_files[:2], str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.txt")]
    dataset, whole = read_all(names, "text", streaming=True), read_all(names, "text")
    assert dataset.num_shards == 4 and len(whole) == 2 * IN_PART + 80
    texts = [text.strip() for stream in range(STREAMS) for text in first_epoch(dataset, stream)]
    assert sorted(texts) == sorted(text.strip() for text in whole["text"])


def test_an_epoch_of_a_stream_without_text_for_a_lane_is_an_error(tmp_path):
    Dataset.from_dict({"text": ["one", " ", "three"]}).to_parquet(tmp_path / "a.parquet")
    dataset = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    with pytest.raises(UserError, match="too few documents for 16 streams"):
        list(islice(StreamedDocuments(TextShards(dataset), 15, STREAMS, seed=0), 5))


def test_a_stream_that_breaks_off_is_an_error_of_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    dataset = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    (tmp_path / "a.jsonl").write_text("{nonsense\n")
    with pytest.raises(UserError, match="streaming the text failed") as caught:
        next(iter(StreamedDocuments(TextShards(dataset), 0, STREAMS, seed=0)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_documents_than_lanes_are_enough(tokenizer, count):
    texts = ["The cat sat on the mat.", "Who are you?", "Tell me a story."][:count]
    streams = TextStreams(Dataset.from_dict({"text": texts}), tokenizer, MAX_LENGTH)
    rows = written(streams(15), 20)
    said = tokenizer.decode([token for row in rows for token in row["input_ids"]])
    assert all(text in said for text in texts)


@pytest.mark.parametrize("texts", [[], ["", " \n", None]])
def test_data_without_text_is_an_error_not_an_endless_wait(tokenizer, texts):
    with pytest.raises(UserError, match="no text"):
        TextStreams(Dataset.from_dict({"text": texts}), tokenizer, MAX_LENGTH)(0)


def test_blank_documents_are_left_out(tokenizer):
    streams = TextStreams(Dataset.from_dict({"text": ["", "cat", None, "  \n"]}), tokenizer, MAX_LENGTH)
    ids = encode_documents(tokenizer, ["cat"])[0]
    assert all(row["input_ids"] == (ids * MAX_LENGTH)[: MAX_LENGTH + 1] for row in written(streams(2), 4))


def test_a_waiting_document_longer_than_a_row_keeps_only_what_can_be_written(tokenizer):
    texts = Dataset.from_dict({"text": ["the cat " * 5000, "cat", "mat"]})
    stream = TextStreams(texts, tokenizer, MAX_LENGTH)(0)
    written(stream, 3)
    assert max(len(ids) for _, _, ids in stream.buffer.waiting) == MAX_LENGTH + 1
    assert max(length for length, _, _ in stream.buffer.waiting) > 5000


def encoded_texts(streams, monkeypatch) -> list[str]:
    """Fills up with every text that is encoded."""
    encoded, encode = [], streams.encoder.encode
    monkeypatch.setattr(streams.encoder, "encode", lambda texts: encoded.extend(texts) or encode(texts))
    return encoded


def test_few_documents_are_encoded_once_for_all_lanes_and_epochs(tokenizer, monkeypatch):
    texts = ["the cat " * 5000, "cat", "", "mat " * 40, None]
    streams = TextStreams(Dataset.from_dict({"text": texts}), tokenizer, MAX_LENGTH)
    encoded = encoded_texts(streams, monkeypatch)
    for stream in range(STREAMS):
        written(streams(stream), 50)
    assert sorted(encoded) == sorted(text for text in texts if text)


def test_the_rows_of_few_documents_are_those_of_encoding_them_again(tokenizer, monkeypatch):
    def rows():
        streams = TextStreams(Dataset.from_dict({"text": [*texts_of(20), "the cat " * 3000]}), tokenizer, MAX_LENGTH)
        return [written(streams(stream), 30) for stream in (0, 5, 15)]

    kept = rows()
    monkeypatch.setattr(streams_module, "FEW", 0)
    assert rows() == kept


def test_of_many_documents_none_is_kept(tokenizer, monkeypatch):
    monkeypatch.setattr(streams_module, "FEW", 40)
    streams = TextStreams(Dataset.from_dict({"text": texts_of(41)}), tokenizer, MAX_LENGTH)
    encoded = encoded_texts(streams, monkeypatch)
    written(streams(0), 300)
    assert len(encoded) > 82 and not streams.encoded


def test_long_documents_are_encoded_few_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(streams_module, "CHARACTERS_AT_ONCE", 100)
    texts = ["the cat " * 10, "mat " * 10, "cat " * 30, "", "the"]
    streams = TextStreams(Dataset.from_dict({"text": texts}), tokenizer, MAX_LENGTH)
    groups, encode = [], streams.encoder.encode
    monkeypatch.setattr(streams.encoder, "encode", lambda texts: groups.append(list(texts)) or encode(texts))
    documents = streams.encode(texts)
    assert groups == [[texts[0], texts[1]], [texts[2]], [texts[4]]]
    whole = encode_documents(tokenizer, texts)
    assert [document and (document[0], document[1].tolist()) for document in documents] == [
        (len(ids), ids[: MAX_LENGTH + 1]) if text else None for text, ids in zip(texts, whole, strict=True)
    ]


def test_every_conversation_comes_whole_and_once_an_epoch(tokenizer):
    streams = ConversationStreams(conversations(40), 900, MAX_LENGTH)
    stream = streams(2)
    for row in written(stream, 200):
        assert any(label != IGNORED for label in row["labels"][1:])
        for index in set(row["input_ids"]) - {900}:
            assert row["input_ids"].count(index) % (len(streams.conversations[index][0]) - 1) == 0


def test_conversations_that_cannot_be_learnt_from_are_refused():
    with pytest.raises(UserError, match="no conversation"):
        ConversationStreams([], 0, MAX_LENGTH)
    with pytest.raises(UserError, match="conversation 2 has more than 33 tokens"):
        ConversationStreams([([1, 2], [0, 1]), ([1] * 34, [0] + [1] * 33)], 0, MAX_LENGTH)
    with pytest.raises(UserError, match="conversation 1 .* none to train on"):
        ConversationStreams([([1, 2], [1, 0])], 0, MAX_LENGTH)


def test_text_is_mixed_in_at_the_given_rate_and_not_by_all_lanes_at_once(tokenizer):
    texts = TextStreams(Dataset.from_dict({"text": ["cat " * 100]}), tokenizer, MAX_LENGTH)
    streams = MixedStreams(ConversationStreams(conversations(40), 900, MAX_LENGTH), texts, replay_every=4)
    is_text = np.array(
        [[900 not in row["input_ids"] for row in written(streams(stream), 20)] for stream in range(STREAMS)]
    )
    assert (is_text.sum(axis=1) == 4).all()
    assert set(is_text.sum(axis=0)) == {3, 4}  # of the 16 rows that come after each other


@pytest.mark.parametrize("replay_every", [0, -1])
def test_no_rows_between_replayed_text_are_refused(tokenizer, replay_every):
    texts = TextStreams(Dataset.from_dict({"text": ["cat"]}), tokenizer, MAX_LENGTH)
    with pytest.raises(UserError, match=f"replay_every {replay_every}: .* at least 1"):
        MixedStreams(ConversationStreams(conversations(40), 900, MAX_LENGTH), texts, replay_every)


def test_a_state_of_other_data_is_refused(tokenizer):
    def streams(count, seed):
        return TextStreams(Dataset.from_dict({"text": texts_of(count)}), tokenizer, MAX_LENGTH, seed=seed)

    state = streams(20, 0)(0).state_dict()
    for other in (streams(21, 0), streams(20, 1)):
        with pytest.raises(UserError, match="made with other data"):
            other(0).load_state_dict(state)


def test_documents_of_a_dataset_made_of_parts(tokenizer):
    texts = concatenate_datasets([Dataset.from_dict({"text": texts_of(n)}) for n in (5, 7)])
    rows = [row["input_ids"] for row in written(TextStreams(texts, tokenizer, MAX_LENGTH)(0), 20)]
    whole = TextStreams(Dataset.from_dict({"text": texts["text"][:]}), tokenizer, MAX_LENGTH)(0)
    assert rows == [row["input_ids"] for row in written(whole, 20)]


def test_text_that_no_row_can_hold_is_told(tokenizer, part_files):
    def line(texts, max_length):
        return out_of_reach(Dataset.from_dict({"text": texts}), tokenizer, max_length)

    long = "the cat sat\n" * 500
    tokens = len(encode_documents(tokenizer, [long])[0]) - 1
    told = line([long, None, "", "cat"], 100)
    assert told.startswith("train_files: only the first 100 tokens of a document fit a row: about ")
    assert abs(float(told.split("about ")[1].split(" %")[0]) - 100 * 100 / tokens) < 0.2
    assert line([long], tokens // 2 - 10) and line([long], tokens // 2 + 10) is None
    assert line(["the cat sat\n" * 10] * 40 + [long], 100) is not None
    assert line(["the cat sat\n" * 2] * 400 + [long], 100) is None
    assert out_of_reach(few_parts(part_files), tokenizer, 1) is None  # a dataset is not read beforehand
