"""Reading a stream's shards: ahead of their use, within bounds, and on where the Hub failed."""

import threading
import time
from itertools import chain, count, islice

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import constants

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.texts import text_source
from recipes.training.data import shards as shards_module
from recipes.training.data.shards import RETRIES, ReadAhead, TextShards

FILES, DOCUMENTS = 70, 30  # enough files to be streamed


def contents():
    return [[f"file {file} document {i}" for i in range(DOCUMENTS)] for file in range(FILES)]


@pytest.fixture
def corpus(hub, tmp_path):
    """A data set on the Hub of 70 files."""
    for number, texts in enumerate(contents()):
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data" / f"train-{number:02}.parquet")
    hub.put("me/corpus", tmp_path / "data", kind="datasets")
    return hub


@pytest.fixture
def pauses(monkeypatch):
    """Retries at once; fills up with the seconds that would have passed before each."""
    seconds: list[float] = []
    monkeypatch.setattr(shards_module, "sleep", seconds.append)
    return seconds


def test_items_come_in_order_and_a_bounded_number_is_taken_ahead():
    taken = []
    items = ReadAhead((taken.append(i) or i for i in count(1)), size=lambda _: 10, most=35)
    deadline = time.monotonic() + 10
    while len(taken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert taken == [1, 2, 3, 4]
    assert list(islice(items, 20)) == list(range(1, 21))
    time.sleep(0.05)
    assert len(taken) <= 24
    items.close()


def test_a_closed_reader_ends_with_the_item_that_it_reads():
    ended = threading.Event()

    def items():
        try:
            yield from count()
        finally:
            ended.set()

    ahead = ReadAhead(items(), size=lambda _: 1, most=5)
    assert next(ahead) == 0
    ahead.close()
    assert ended.wait(10)


def test_an_item_larger_than_the_bound_is_read_alone():
    assert list(ReadAhead(["a" * 50, "b" * 50], size=len, most=1)) == ["a" * 50, "b" * 50]


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise UserError("broken")

    ahead = ReadAhead(items(), size=lambda _: 1)
    assert next(ahead) == 1
    with pytest.raises(UserError, match="broken"):
        next(ahead)


def test_a_slow_source_is_read_while_the_consumer_is_busy():
    started, waiting = threading.Event(), threading.Event()

    def items():
        yield 1
        started.set()
        waiting.wait(10)
        yield 2

    ahead = ReadAhead(items(), size=lambda _: 1)
    assert next(ahead) == 1
    assert started.wait(10)  # before the second item is asked for
    waiting.set()
    assert next(ahead) == 2


def all_texts(shards):
    return [[text for block in shards.read(shard) for text in block] for shard in range(shards.count)]


@pytest.mark.parametrize(
    "fault",
    [
        lambda hub: hub.fail("GET .*train-07.parquet", 500, times=9),
        lambda hub: hub.fail("GET .*train-07.parquet", 429, times=20, Retry_After="1"),
        lambda hub: hub.cut("GET .*train-07.parquet", keep=100, times=20),
    ],
    ids=["500", "429", "cut"],
)
def test_where_the_hub_fails_reading_goes_on_with_the_same_texts(corpus, pauses, capsys, fault):
    shards = TextShards(text_source(["me/corpus"]))
    fault(corpus)
    assert all_texts(shards) == contents()
    assert pauses[:1] == [1.0]
    assert "warning: streaming the text failed" in capsys.readouterr().out


def test_after_a_failure_within_a_shard_no_block_is_lost_or_repeated(tmp_path, pauses, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shards_module, "BLOCK", 7)
    Dataset.from_dict({"text": contents()[0]}).to_parquet(tmp_path / "a.parquet")
    dataset = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    failures = iter([0, 1, 0, 2, 0, 0, 3])

    class Breaking:
        num_shards = 1

        def shard(self, **options):
            return self

        def iter(self, size):
            for number, batch in enumerate(dataset.iter(size)):
                yield batch
                if number == next(failures, None):
                    raise ConnectionError("gone")

    assert list(chain(*TextShards(Breaking()).read(0))) == contents()[0]
    assert pauses and max(pauses) <= 4


def test_a_hub_that_keeps_failing_ends_in_one_line(corpus, pauses):
    shards = TextShards(text_source(["me/corpus"]))
    corpus.fail("GET .*train-07.parquet", 500, times=10_000)
    with pytest.raises(UserError, match=r"^streaming the text failed \(.*500.*\); resume when it can be read$"):
        list(shards.read(7))
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60] and len(pauses) == RETRIES


@pytest.mark.parametrize("status", [401, 403])
def test_what_a_retry_cannot_change_is_not_tried_again(corpus, pauses, status):
    shards = TextShards(text_source(["me/corpus"]))
    corpus.fail("GET .*train-07.parquet", status, times=10_000)
    with pytest.raises(UserError, match="streaming the text failed"):
        list(shards.read(7))
    assert not pauses


def test_a_hub_that_never_answers_while_reading_is_tried_again(corpus, pauses, monkeypatch):
    shards = TextShards(text_source(["me/corpus"]))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.02)
    corpus.silence("GET .*train-07.parquet", times=20)
    assert list(shards.read(7)) == contents()[7:8]
    assert pauses[:1] == [1.0]
