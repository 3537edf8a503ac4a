"""How training ends early. Asked to, it stops after the step that is running: for SIGTERM, which schedulers send before they
kill, for Ctrl-C, and for SIGHUP, when the terminal is closed. When one process fails, all end at once: the others may wait
in a collective that never completes, on NCCL for ten minutes.
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

import psutil
import torch.distributed as dist

from modeling_nanochat.errors import UserError

ECHO_SECONDS = 2.0  # torchrun passes on the Ctrl-C that the terminal has sent to its processes anyway


class Stopped(Exception):
    """Training was asked to end early; its checkpoint is on disk. The message says how to go on."""


def single_process_launcher() -> int | None:
    """The id of the `accelerate launch` that started this process, if one did.

    With one process to start it dies of SIGTERM without a word to that process, which would train on, unknown to anyone.
    """
    parent = os.getppid()
    try:
        command = " ".join(psutil.Process(parent).cmdline()[:4])
    except psutil.Error:
        return None
    return parent if re.search(r"python\S* .*accelerate\S*\W?launch", command) else None


@dataclass
class StopRequest:
    """Whether and by what training was asked to stop."""

    signal_name: str | None = None
    noted_at: float = 0.0
    launcher: int | None = field(default_factory=single_process_launcher)
    terminals: list[int] = field(default_factory=lambda: [number for number in (1, 2) if os.isatty(number)])

    @property
    def reason(self) -> str | None:
        if self.signal_name:
            return f"{self.signal_name} received"
        return "the launcher has ended" if self.launcher not in (None, os.getppid()) else None

    def note(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGHUP":
            leave(self.terminals)
        if self.signal_name is None:
            self.signal_name, self.noted_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.noted_at > ECHO_SECONDS:
            raise KeyboardInterrupt  # a person who asks again does not want to wait


def leave(terminals: list[int]) -> None:
    """Send what would be written to a terminal that is gone nowhere, where no error comes back from."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block these signals are noted instead of obeyed; afterwards all is as before."""
    request = StopRequest()
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # for the others to end before the one that failed, which may hold the store
OUTCOME_SECONDS = 120.0
FAILED, ENDED = "failed", "ended"


def shared_store() -> dist.Store:
    """Keys and values that all processes see, apart from those of torch itself."""
    return dist.PrefixStore("nanochat", dist.distributed_c10d._get_default_store())


@contextmanager
def ending_together() -> Iterator[None]:
    """An exception within the block, on any process, ends all processes in seconds; only the first says why.

    With a single process, and for signals, nothing changes. The block must end before a process may leave the others.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=end_with_the_others, args=(shared_store(), over), daemon=True)
    watch.start()
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        over.set()
        watch.join()
    if failure:
        fail(failure)


def end_with_the_others(store: dist.Store, over: threading.Event) -> None:
    """In a thread, until `over`: end this process as soon as another one has failed, whatever it is doing."""
    while not over.wait(POLL_SECONDS):
        try:
            if not store.check([FAILED]):
                continue
            store.add(ENDED, 1)
        except RuntimeError:  # the process that holds the store is gone; it would have waited if it had failed itself
            say("error: another process was killed; its launcher may know why, --resume auto goes on\n")
        os._exit(1)


def fail(error: Exception) -> None:
    """Say what happened, unless another process failed before, whose message this error may be a consequence of. Ends."""
    store = shared_store()
    try:
        first = store.add(FAILED, 1) == 1
    except RuntimeError:  # its holder failed, or was killed, which nobody else could say
        first = not isinstance(error, UserError)
    if first:
        say(f"error: {error}\n" if isinstance(error, UserError) else "".join(traceback.format_exception(error)))
        wait_for_the_others(store)
    else:
        with suppress(RuntimeError):
            store.add(ENDED, 1)
    os._exit(1)  # an ordinary end would wait for what is still in flight between the processes


def say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


def wait_for_the_others(store: dist.Store) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    with suppress(RuntimeError):  # the store is gone, and so is who holds it
        while store.add(ENDED, 0) < dist.get_world_size() - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)


class Outcomes:
    """Numbers that the processes compare without a collective, of which a failed pass may have left one open."""

    def __init__(self) -> None:
        self.rounds = 0

    def smallest(self, number: int) -> int:
        """The smallest of the `number`s that the processes call this with.

        A process with 0, for failed, waits two minutes at most; one that then has not called is stuck in the failed pass.

        Raises:
            TimeoutError: That is so.
        """
        store, self.rounds = shared_store(), self.rounds + 1
        keys = [f"outcome {self.rounds} of {rank}" for rank in range(dist.get_world_size())]
        store.set(keys[dist.get_rank()], str(number))
        deadline = time.monotonic() + OUTCOME_SECONDS
        while not store.check(keys):
            if number == 0 and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_SECONDS / 10)
        return min(int(store.get(key)) for key in keys)
