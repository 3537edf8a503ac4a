"""Batches prepared by a background process, ahead of training.

A `DataLoader` with a worker comes close, but its errors arrive as tracebacks, the worker's death as an exception
raised by a signal handler anywhere in training, Ctrl-C makes the worker print a traceback too, and it cannot tell
consumed from prefetched batches.

The two processes share a ring buffer: the worker packs rows into a slot, the trainer copies the slot out (on CUDA into
pinned memory). So tokens are copied once between packing and the device, and no batch needs files or sockets.
"""

import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import config

from modeling_nanochat.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext, SpawnContext  # Windows has only one of them

TOKENS_AHEAD = 2**19  # prefetched by the worker: an optimizer step takes all its micro-batches at once
MOST_SLOTS = 256
Shapes = dict[str, tuple[int, int]]  # of a batch's tensors, all int64
Fill = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None]  # writes a batch, may return a state

Filled = tuple[dict[str, torch.Tensor], dict[str, np.ndarray] | None]


class BackgroundBatches:
    """Iterator over pairs (batch, state or None), in the order in which another process makes them.

    Args:
        begin: Called in that process; returns the function that fills the next batch's arrays. Must be picklable where
            processes are not forked.

    Raises:
        UserError: The worker raised one, or died.
        RuntimeError: The worker raised another error; the message has its traceback.
    """

    def __init__(self, begin: Callable[[], Fill], shapes: Shapes):
        batch_tokens = max(rows * width for rows, width in shapes.values())
        self.depth = max(2, min(MOST_SLOTS, TOKENS_AHEAD // batch_tokens))
        forks = sys.platform == "linux"
        self.slots = {name: shared_zeros((self.depth, *shape), forks) for name, shape in shapes.items()}
        context: ForkContext | SpawnContext = get_context("fork") if forks else get_context("spawn")
        self.free = context.Semaphore(self.depth)
        self.connection, theirs = context.Pipe(duplex=False)
        worker = (begin, self.slots, self.free, theirs, os.getpid())
        self.process = context.Process(target=work, args=worker, name="batches", daemon=True)
        self.process.start()
        theirs.close()  # leaves only the worker's end open: when it dies, reading ends
        # Runs before multiprocessing's own cleanup, which sends SIGTERM and waits
        self.close = Finalize(self, stop, args=(self.process, self.connection), exitpriority=100)
        self.taken = 0

    def __iter__(self) -> Iterator[Filled]:
        return self

    def __next__(self) -> Filled:
        kind, message = self.receive()
        if kind == "user error":
            raise UserError(message)
        if kind == "error":
            raise RuntimeError(f"the process that prepares the batches failed:\n{message}")
        batch = {name: copy_out(slots[self.taken % self.depth]) for name, slots in self.slots.items()}
        self.free.release()
        self.taken += 1
        return batch, message

    def receive(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(timeout=10)
            how = exit_reason(self.process.exitcode)
            raise UserError(
                f"the process that prepares the batches {how}; resume, with more memory if that ran out"
            ) from error


def shared_zeros(shape: tuple[int, ...], forks: bool) -> torch.Tensor:
    """Zeros in memory shared with processes started later.

    A forked process inherits anonymous memory. Torch's would be in /dev/shm, to which docker gives 64 MiB by default:
    less than eight processes with labels and positions need.
    """
    if not forks:
        return torch.zeros(shape, dtype=torch.long).share_memory_()
    return torch.frombuffer(mmap.mmap(-1, 8 * math.prod(shape)), dtype=torch.long).view(shape)


def copy_out(slot: torch.Tensor) -> torch.Tensor:
    return slot.pin_memory() if torch.cuda.is_available() else slot.clone()


def exit_reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"


def stop(process: multiprocessing.Process, connection: Connection) -> None:
    process.kill()  # it has nothing to clean up
    process.join()
    connection.close()


def work(
    begin: Callable[[], Fill], slots: dict[str, torch.Tensor], free: Semaphore, connection: Connection, parent: int
) -> None:
    """The worker process: write batch after batch into the slots, until the trainer stops it or dies."""
    set_up_worker(parent)
    outbox: SimpleQueue = SimpleQueue()
    sender = threading.Thread(target=send, args=(outbox, connection))
    sender.start()  # a thread, so that packing never waits until a state has been read
    try:
        fill = begin()
        for number in count():
            free.acquire()
            slot = number % next(iter(slots.values())).shape[0]
            outbox.put(("batch", fill({name: tensor[slot].numpy() for name, tensor in slots.items()})))
    except UserError as error:
        outbox.put(("user error", str(error)))
    except BaseException:  # also SystemExit or a Rust panic: otherwise the trainer would wait forever
        outbox.put(("error", traceback.format_exc()))
    outbox.put(None)
    sender.join()


def set_up_worker(parent: int) -> None:
    """Ignore signals to the process group, which the trainer handles; exit with the trainer; use a single thread."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    # By itself `datasets` would try for half an hour, in silence, what `shards.py` tries again
    config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_READ_MAX_RETRIES = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork; the encoder has its own
    threading.Thread(target=exit_with, args=(parent,), daemon=True).start()


def exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def send(outbox: SimpleQueue, connection: Connection) -> None:
    for message in iter(outbox.get, None):
        try:
            connection.send(message)
        except Exception:  # the reader is gone, or out of memory: without a sender the worker would never exit
            os._exit(1)
