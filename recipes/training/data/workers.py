"""A function applied to many items by forked processes, in the items' order.

`map(num_proc=...)` of `datasets` needs one schema for all rows, which calls of different tools do not have, and writes
the texts to disk once more. A pool of the standard library waits forever for a worker that was killed.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from evals.tasks.humaneval import cores
from modeling_nanochat.errors import UserError

from .background import set_up_worker

Item = TypeVar("Item")
Result = TypeVar("Result")
FEW = 1000  # items that are not worth a process
BATCH = 64  # items that a worker takes at once
MOST_WORKERS = 32  # then this process is busy with reading and sending the items


def workers_here() -> int:
    """How many workers this process may start: its share of the cores, none where processes are not forked."""
    return min(MOST_WORKERS, cores()) if sys.platform == "linux" else 0


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield what `function` returns for each item, in order, with few items in memory at a time.

    The first `FEW`, and all with less than two workers, are computed in this process.

    Raises:
        UserError: A worker was killed.
        RuntimeError: `function` raised in a worker; the message has its traceback.
    """
    items = iter(items)
    yield from map(function, islice(items, FEW) if workers > 1 else items)
    batches = enumerate(iter(lambda: list(islice(items, BATCH)), []))
    idle, running, done, turn = list[Connection](), dict[Connection, int](), dict[int, list[Result]](), 0
    with ExitStack() as started:
        while True:
            while (idle or len(running) < workers) and (task := next(batches, None)):
                pipe = idle.pop() if idle else started.enter_context(worker(function))
                running[pipe], batch = task
                with reported_death():
                    pipe.send(batch)
            if not running:
                return
            ready: list[Any] = wait(list(running))
            for pipe in ready:
                done[running.pop(pipe)] = received(pipe)
                idle.append(pipe)
            while turn in done:
                yield from done.pop(turn)
                turn += 1


@contextmanager
def worker(function: Callable[[Item], Result]) -> Iterator[Connection]:
    """A process that applies `function`, which it inherits, to batches of items; the connection to it."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(function, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # leaves only the worker's end open: when it dies, reading ends
    try:
        yield ours
    finally:
        process.kill()  # it has nothing to clean up
        process.join()
        ours.close()


def work(function: Callable[[Item], Result], connection: Connection, parent: int) -> None:
    set_up_worker(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which `multiprocessing` ends it when the parent exits
    while True:
        batch = connection.recv()
        try:
            connection.send([function(item) for item in batch])
        except BaseException:  # also a Rust panic: the trainer would take it for a lack of memory
            connection.send(traceback.format_exc())


def received(pipe: Connection) -> list:
    with reported_death():
        results = pipe.recv()
    if isinstance(results, str):
        raise RuntimeError(f"a process that prepares the data failed:\n{results}")
    return results


@contextmanager
def reported_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise UserError(
            "a process that prepares the data was killed; run again, with more memory if that ran out"
        ) from error
