"""One process's training data: micro-batches in a fixed global order, prefetched, exactly resumable.

Row g of the run (see `recipes.training.data.streams`) belongs to process g % world_size. After every step all
processes have received the same number of rows, so one number is the position of the run, and any number of processes
can resume it.
"""

import time
from collections.abc import Sequence
from functools import partial
from math import gcd

import numpy as np
import torch
from safetensors import safe_open

from modeling_nanochat.errors import UserError

from .background import BackgroundBatches, Fill, Shapes
from .streams import STREAMS, Row, RowStream, StreamMaker, below

TOKENS_BETWEEN_STATES = 2**20  # per process: at most this many are packed again when resuming
STALLED = 0.03  # share of the time waited for data that is reported
STALL_SECONDS = 60.0  # over which it is measured at first
StreamStates = dict[int, dict[str, np.ndarray]]


class Loader:
    """Endless micro-batches, packed by a background process, ahead of training.

    A batch is {"input_ids": Long (batch_size, max_length + 1)}, for conversations also "labels".

    Args:
        make_stream: Creates the stream of a number, and knows the widths of the arrays that streams write.
        batch_size: Rows per micro-batch of this process.
        rank, world_size: This process, and the number of processes.
        document_start: For document masking, the id that every document begins with: adds "position_ids" (batch_size,
            max_length), which restart at it.

    Raises:
        UserError: The data cannot be read, or the background process was killed.
    """

    def __init__(
        self,
        make_stream: StreamMaker,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        document_start: int | None = None,
    ):
        self.make_stream, self.batch_size, self.rank, self.world_size = make_stream, batch_size, rank, world_size
        self.document_start = document_start
        self.row = 0  # of the run; rows before it have been returned
        self.states: StreamStates = {}  # at some earlier row
        self.batches: BackgroundBatches | None = None
        self.stalls = StallReport(rank)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batches, started = self.start(), time.perf_counter()
        batch, states = next(batches)
        self.stalls.add(time.perf_counter() - started)
        self.row += self.batch_size * self.world_size
        if states is not None:
            self.states = by_stream(states)
        return batch

    def start(self) -> BackgroundBatches:
        """Start preparing batches, which is otherwise done by the first `next`."""
        if self.batches is None:
            begin = partial(
                begin_filling, self.make_stream, self.rank, self.world_size, self.row, self.states, self.document_start
            )
            self.batches = BackgroundBatches(begin, self.shapes())
            self.stalls = StallReport(self.rank)
        return self.batches

    def shapes(self) -> Shapes:
        widths = dict(self.make_stream.widths)
        if self.document_start is not None:
            widths["position_ids"] = widths["input_ids"] - 1
        return {name: (self.batch_size, width) for name, width in widths.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The position after the batches returned so far, and stream states to resume from.

        Take it between optimizer steps, when every process has received the same number of batches.
        """
        states = {f"stream.{n}.{name}": array for n, state in self.states.items() for name, array in state.items()}
        numbers = {"row": np.array(self.row), "streams": np.array(STREAMS)}
        return {name: torch.from_numpy(np.array(array)) for name, array in (numbers | states).items()}

    def load_state_dict(self, shards: Sequence[safe_open]) -> None:
        """Continue the run whose processes, however many, saved `shards`: the opened `state_dict` of each.

        Raises:
            UserError: The states are not from one step of one run, or from a version with other streams.
        """
        self.close()
        self.row = common_row(shards)
        self.states = newest_states(shards, own_streams(self.rank, self.world_size))

    def close(self) -> None:
        """Stop the background process. The next batch starts another, which continues."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None


class StallReport:
    """Warns if training waits for data, with fewer lines the longer it does."""

    def __init__(self, rank: int):
        self.rank, self.window = rank, STALL_SECONDS
        self.since: float | None = None  # the first batch, for which everything starts
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Add the seconds that a batch was waited for."""
        now = time.perf_counter()
        if self.since is None:
            self.since = now
            return
        self.seconds += seconds
        if (passed := now - self.since) < self.window:
            return
        if self.seconds > STALLED * passed:
            print(
                f"warning: process {self.rank} waited {self.seconds:.0f} of the last {passed:.0f} seconds for data; "
                "download text that is streamed, set tokenized_cache, or use more CPU cores",
                flush=True,
            )
            self.window *= 2
        self.since, self.seconds = now, 0.0


def own_streams(rank: int, world_size: int) -> list[int]:
    """The streams that contain rows of this process."""
    step = gcd(world_size, STREAMS)
    return list(range(rank % step, STREAMS, step))


def begin_filling(
    make_stream: StreamMaker, rank: int, world_size: int, row: int, states: StreamStates, document_start: int | None
) -> Fill:
    streams = {number: make_stream(number) for number in own_streams(rank, world_size)}
    for number, state in states.items():
        streams[number].load_state_dict(state)
    return Filler(streams, rank, world_size, row, document_start).fill


class Filler:
    """Writes one process's rows, batch after batch, starting at row `row` of the run."""

    def __init__(
        self, streams: dict[int, RowStream], rank: int, world_size: int, row: int, document_start: int | None
    ):
        self.streams, self.world_size, self.document_start = streams, world_size, document_start
        self.row = row + (rank - row) % world_size
        self.tokens = TOKENS_BETWEEN_STATES  # since the last state: the first batch returns one

    def fill(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Write the arrays (batch_size, width); returns the streams' states every `TOKENS_BETWEEN_STATES` tokens."""
        for i in range(len(batch["input_ids"])):
            self.write({name: rows[i] for name, rows in batch.items()})
        self.tokens += batch["input_ids"].size
        if self.tokens < TOKENS_BETWEEN_STATES:
            return None
        self.tokens = 0
        states = {n: stream.state_dict() for n, stream in self.streams.items()}
        return {f"{n}.{name}": array for n, state in states.items() for name, array in state.items()}

    def write(self, row: Row) -> None:
        stream = self.streams[self.row % STREAMS]
        while stream.rows < self.row // STREAMS:  # rows of another process, or from before the resume
            stream.write(row)
        stream.write(row)
        if self.document_start is not None:
            row["position_ids"][:] = positions(row["input_ids"][:-1], self.document_start)
        self.row += self.world_size


def positions(ids: np.ndarray, document_start: int) -> np.ndarray:
    """Position (n,) of each token in its document."""
    index = np.arange(len(ids))
    return index - np.maximum.accumulate(np.where(ids == document_start, index, 0))


def by_stream(states: dict[str, np.ndarray]) -> StreamStates:
    streams = {int(name.partition(".")[0]) for name in states}
    return {stream: below(f"{stream}.", states) for stream in sorted(streams)}


def common_row(shards: Sequence[safe_open]) -> int:
    if any(int(shard.get_tensor("streams")) != STREAMS for shard in shards):
        raise UserError("made by a version with other data streams; resume with that version or start over")
    rows = {int(shard.get_tensor("row")) for shard in shards}
    if len(rows) != 1:
        raise UserError("the states of the data are not of one step; use another checkpoint")
    return rows.pop()


def newest_states(shards: Sequence[safe_open], streams: Sequence[int]) -> StreamStates:
    """The state of each stream, from the shard in which it is furthest ahead; not every process uses every stream."""
    newest: StreamStates = {}
    for stream in streams:
        prefix = f"stream.{stream}."
        saved = [shard for shard in shards if f"{prefix}rows" in shard.keys()]
        if saved:
            furthest = max(saved, key=lambda shard: int(shard.get_tensor(f"{prefix}rows")))
            names = [name for name in furthest.keys() if name.startswith(prefix)]
            newest[stream] = {name.removeprefix(prefix): furthest.get_tensor(name).numpy().copy() for name in names}
    return newest
