"""The loader: one global order of rows for any number of processes, exact continuation, no worker left behind."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_nanochat.errors import UserError
from recipes.training.data import loader as loader_module
from recipes.training.data.background import BackgroundBatches
from recipes.training.data.loader import Loader, StallReport, begin_filling, own_streams, positions
from recipes.training.data.streams import STREAMS, ConversationStreams, MixedStreams, TextStreams

MAX_LENGTH = 24
DOCUMENTS = 150  # some 60 rows an epoch


@pytest.fixture
def tokenizer(toy_model_and_tokenizer):
    return toy_model_and_tokenizer[1]


@pytest.fixture
def streams(tokenizer):
    texts = [f"{i} " + "the cat sat " * (i % 5) for i in range(DOCUMENTS)]
    return TextStreams(Dataset.from_dict({"text": texts}), tokenizer, MAX_LENGTH, threads=1)


@pytest.fixture
def talk(tokenizer, streams):
    rng = np.random.default_rng(0)
    rendered = [
        (np.array([319, *rng.integers(0, 250, n)]), np.array([0, *([1] * n)])) for n in rng.integers(2, 20, 80)
    ]
    return MixedStreams(ConversationStreams(rendered, 319, MAX_LENGTH), streams, replay_every=2)


def take(loader, count):
    return list(islice(loader, count))


def equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def run_on(make_stream, world_size, rows, batch_size=2, shards=()):
    """(rows of the run in their order, states) of `world_size` processes that each take their share of `rows` rows."""
    loaders = [Loader(make_stream, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    for loader in loaders if shards else []:
        loader.load_state_dict(shards)
    start = loaders[0].row
    ordered = {}
    for rank, loader in enumerate(loaders):
        mine = torch.cat([next(loader)["input_ids"] for _ in range(rows // world_size // batch_size)])
        first = start + (rank - start) % world_size
        ordered |= {first + i * world_size: row for i, row in enumerate(mine)}
    assert sorted(ordered) == list(range(start, start + rows))
    return torch.stack([ordered[g] for g in sorted(ordered)]), [loader.state_dict() for loader in loaders]


def saved(states, folder):
    """The opened states, as `Checkpoint.shards` returns them."""
    files = [folder / f"{i}.safetensors" for i in range(len(states))]
    for state, file in zip(states, files, strict=True):
        file.unlink(missing_ok=True)  # it may still be open
        save_file(state, file)
    return [safe_open(file, "pt") for file in files]


class Here:
    """`BackgroundBatches` without the background: in the test's own process."""

    def __init__(self, begin, shapes):
        self.fill, self.shapes = begin(), shapes

    def __next__(self):
        batch = {name: torch.empty(shape, dtype=torch.long) for name, shape in self.shapes.items()}
        states = self.fill({name: tensor.numpy() for name, tensor in batch.items()})
        return batch, states

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(loader_module, "BackgroundBatches", Here)


@pytest.fixture(params=["background", "here"])
def anywhere(request):
    if request.param == "here":
        request.getfixturevalue("here")


@pytest.fixture(params=[300, 2**20], ids=["states often", "states rarely"])
def states_every(request, monkeypatch):
    monkeypatch.setattr(loader_module, "TOKENS_BETWEEN_STATES", request.param)


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_a_run_resumed_after_40_batches_continues_with_the_same_8(
    streams, talk, kind, anywhere, states_every, tmp_path
):
    make_stream = streams if kind == "text" else talk
    loader = Loader(make_stream, batch_size=4)
    take(loader, 40)
    shards = saved([loader.state_dict()], tmp_path)
    expected = take(loader, 8)
    loader.close()
    resumed = Loader(make_stream, batch_size=4)
    resumed.load_state_dict(shards)
    equal(take(resumed, 8), expected)
    resumed.close()


def test_40_batches_go_beyond_an_epoch(streams, monkeypatch, here):
    monkeypatch.setattr(loader_module, "TOKENS_BETWEEN_STATES", 1)
    loader = Loader(streams, batch_size=4)
    take(loader, 40)
    assert all(int(loader.states[stream]["cursor"]) > 2 * DOCUMENTS for stream in range(STREAMS))


@pytest.mark.parametrize("kind", ["text", "mixed"])
def test_in_the_background_comes_the_same(streams, talk, kind, states_every, request):
    make_stream = streams if kind == "text" else talk
    loaders = [Loader(make_stream, batch_size=3) for _ in range(2)]
    batches = take(loaders[0], 30)
    request.getfixturevalue("here")
    equal(batches, take(loaders[1], 30))
    assert loaders[0].state_dict().keys() == loaders[1].state_dict().keys()
    for name, tensor in loaders[0].state_dict().items():
        assert torch.equal(tensor, loaders[1].state_dict()[name]), name
    loaders[0].close()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (5, 16), (1, 32)])
def test_another_number_of_processes_gets_the_same_rows_in_the_same_order(
    streams, before, after, states_every, tmp_path, here
):
    in_one_go, _ = run_on(streams, 1, 320)
    first, states = run_on(streams, before, 60 // before * before, batch_size=1)
    second, _ = run_on(streams, after, 192 // after * after, batch_size=1, shards=saved(states, tmp_path))
    together = torch.cat([first, second])
    assert torch.equal(together, in_one_go[: len(together)])


@pytest.mark.parametrize("kind", ["mixed", "streamed"])
def test_changing_processes_keeps_the_order_of_every_kind_of_lanes(streams, talk, kind, states_every, tmp_path, here):
    """From 3 processes to 2 and to 1, beyond an epoch of text and of conversations."""
    streamed = TextStreams(streams.texts.to_iterable_dataset(num_shards=20), streams.tokenizer, MAX_LENGTH, threads=1)
    make_stream = {"mixed": talk, "streamed": streamed}[kind]
    in_one_go, _ = run_on(make_stream, 1, 240)
    parts, shards = [], ()
    for world_size, batch_size, rows in [(3, 1, 60), (2, 5, 120), (1, 4, 60)]:
        some, states = run_on(make_stream, world_size, rows, batch_size, shards)
        parts, shards = [*parts, some], saved(states, tmp_path)
    assert torch.equal(torch.cat(parts), in_one_go)


def test_a_run_resumed_before_its_first_batch_or_twice_at_once(streams, tmp_path, here):
    in_one_go, _ = run_on(streams, 1, 60)
    fresh = Loader(streams, batch_size=2)
    shards = saved([fresh.state_dict()], tmp_path)
    rows, states = run_on(streams, 2, 40, shards=shards)
    assert torch.equal(rows, in_one_go[:40])
    again = [Loader(streams, batch_size=1, rank=r, world_size=2) for r in range(2)]
    shards = saved(states, tmp_path)
    for loader in again:
        loader.load_state_dict(shards)
    shards = saved([loader.state_dict() for loader in again], tmp_path)  # not one batch later
    rows, _ = run_on(streams, 1, 20, shards=shards)
    assert torch.equal(rows, in_one_go[40:])


def test_another_batch_size_gets_the_same_rows(streams, tmp_path, here):
    in_one_go, _ = run_on(streams, 1, 90, batch_size=3)
    first, states = run_on(streams, 2, 40, batch_size=4)
    second, _ = run_on(streams, 2, 50, batch_size=5, shards=saved(states, tmp_path))
    assert torch.equal(torch.cat([first, second]), in_one_go)


@pytest.mark.parametrize(
    ("world_size", "count"), [(1, 16), (2, 8), (8, 2), (16, 1), (64, 1), (3, 16), (6, 8), (24, 2)]
)
def test_processes_share_the_lanes(world_size, count):
    shares = [own_streams(rank, world_size) for rank in range(world_size)]
    assert all(len(share) == count for share in shares)
    assert all(g % STREAMS in shares[g % world_size] for g in range(1000))


def test_states_of_different_steps_or_lanes_are_refused(streams, tmp_path, here):
    loader = Loader(streams, batch_size=2)
    states = [loader.state_dict(), (next(loader), loader.state_dict())[1]]
    with pytest.raises(UserError, match="not of one step"):
        loader.load_state_dict(saved(states, tmp_path))
    with pytest.raises(UserError, match="other data streams"):
        loader.load_state_dict(saved([states[0] | {"streams": torch.tensor(4)}], tmp_path))


def test_waiting_for_data_is_reported_with_fewer_lines_the_longer_it_lasts(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(loader_module.time, "perf_counter", lambda: now)
    report = StallReport(rank=3)
    report.add(500)  # the first batch, for which everything starts
    for second in range(1, 800):
        now = float(second)
        report.add(0.05)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        f"warning: process 3 waited {waited} of the last {passed} seconds for data"
        for waited, passed in ((3, 60), (6, 120), (12, 240))
    ]


def test_short_waits_are_not_reported(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(loader_module.time, "perf_counter", lambda: now)
    report = StallReport(rank=0)
    for second in range(400):
        now = float(second)
        report.add(0.02)
    assert capsys.readouterr().out == ""


def test_document_masking_counts_from_every_beginning(streams, tokenizer, anywhere):
    loader = Loader(streams, batch_size=4, document_start=tokenizer.bos_token_id)
    for batch in take(loader, 5):
        ids, place = batch["input_ids"][:, :-1], batch["position_ids"]
        assert place.shape == ids.shape and place.dtype == torch.long
        assert (place == 0).equal(ids == tokenizer.bos_token_id)
        assert ((place[:, 1:] == place[:, :-1] + 1) | (place[:, 1:] == 0)).all()
    loader.close()


def test_positions():
    assert positions(np.array([9, 1, 2, 9, 9, 3]), 9).tolist() == [0, 1, 2, 0, 0, 1]


def test_batches_are_int64_and_their_own(streams):
    loader = Loader(streams, batch_size=4)
    batches = take(loader, 3)
    copies = [batch["input_ids"].clone() for batch in batches]
    take(loader, 300)  # the ring of slots comes round
    loader.close()
    assert all(batch["input_ids"].dtype == torch.long and batch.keys() == {"input_ids"} for batch in batches)
    assert all(torch.equal(batch["input_ids"], copy) for batch, copy in zip(batches, copies, strict=True))


def test_what_the_background_needs_survives_pickling(talk, here):
    """As it must where processes are spawned."""
    begin = (begin_filling, talk, 0, 1, 0, {}, None)
    function, *arguments = pickle.loads(pickle.dumps(begin))
    loader = Loader(talk, batch_size=2)
    batch = {name: np.empty(shape, dtype=np.int64) for name, shape in loader.shapes().items()}
    function(*arguments)(batch)
    equal([{name: torch.from_numpy(array) for name, array in batch.items()}], take(loader, 1))


class Failing:
    widths = {"input_ids": 9}  # noqa: RUF012

    def __init__(self, error):
        self.error = error

    def __call__(self, stream):
        raise self.error


def test_errors_of_the_background_arrive(streams):
    with pytest.raises(UserError, match=r"^a.parquet: broken; repair it$"):
        next(Loader(Failing(UserError("a.parquet: broken; repair it")), batch_size=2))
    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*KeyError: 'oops'"):
        next(Loader(Failing(KeyError("oops")), batch_size=2))


class Panic(BaseException):
    """What a panic in Rust becomes: no Exception."""


def test_whatever_ends_the_background_the_trainer_does_not_wait_for_ever(streams):
    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*Panic: in Rust"):
        next(Loader(Failing(Panic("in Rust")), batch_size=2))
    batches = BackgroundBatches(lambda: lambda batch: {"state": lambda: "that cannot be sent"}, {"input_ids": (2, 9)})
    with pytest.raises(UserError, match=r"^the process that prepares the batches ended with exit code 1; .*memory"):
        next(batches)


def test_a_killed_background_process_is_told_in_one_line(streams):
    loader = Loader(streams, batch_size=2)
    next(loader)
    os.kill(loader.batches.process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^the process that prepares the batches was killed by SIGKILL; .*memory"):
        take(loader, 10_000)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_closing_ends_the_background_process(streams):
    loader = Loader(streams, batch_size=2)
    first = take(loader, 2)
    pid = loader.batches.process.pid
    assert alive(pid)
    loader.close()
    loader.close()
    assert not alive(pid)
    again = Loader(streams, batch_size=2)
    equal(take(again, 2), first)
    pid = again.batches.process.pid
    equal(take(loader, 1), take(again, 1))  # a closed one continues
    del again  # forgotten
    assert not alive(pid)
    loader.close()


SCRIPT = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from recipes.training.data.loader import Loader

class RowStream:
    rows = 0
    def write(self, row):
        row["input_ids"][:] = self.rows
        self.rows += 1
    def state_dict(self):
        return {{}}

class StreamMaker:
    widths = {{"input_ids": 9}}
    def __call__(self, stream):
        return RowStream()

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
signal.signal(signal.SIGHUP, lambda *_: stopped.append(1))
loader = Loader(StreamMaker(), batch_size=2)
next(loader)
print(loader.batches.process.pid, flush=True)
while not stopped:
    time.sleep(0.02)
for _ in range(2000):  # more than was made ready: the worker is still there
    next(loader)
print("done", flush=True)
"""


def started():
    script = SCRIPT.format(path=[str(Path(__file__).parents[4])])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, int(process.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_leaves_the_worker_at_work_and_silent(number):
    process, worker = started()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)  # ends although nobody closed the loader
    assert (process.returncode, out, err) == (0, "done\n", "")
    assert not alive(worker)


def test_the_worker_ends_with_a_killed_trainer():
    process, worker = started()
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def test_the_speed_of_the_loader_alone(toy_model_and_tokenizer, tmp_path, monkeypatch, capsys):
    from recipes.benchmarks import loader_speed

    monkeypatch.setattr(loader_speed, "WARM_UP", 0.0)

    toy_model_and_tokenizer[1].save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n\n" * 50)
    arguments = [
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--train_files",
        str(tmp_path / "a.txt"),
        "--seconds",
        "0.1",
    ]
    monkeypatch.setattr(sys, "argv", ["loader_speed.py", *arguments, "--max_length", "64"])
    loader_speed.main()
    assert re.match(r"first batch after \d+\.\d s, then [\d,]+ tokens/s = [\d.]+ MB/s", capsys.readouterr().out)
