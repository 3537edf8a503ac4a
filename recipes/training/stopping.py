"""How training ends early: on SIGTERM, which schedulers send before they kill, on Ctrl-C, and on SIGHUP, when the
terminal closes, after the current step. How one process's failure ends the others: see `evals.harness.processes`.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
import torch.distributed as dist

from evals.harness.processes import POLL_SECONDS, shared_store

ECHO_SECONDS = 2.0  # torchrun forwards the Ctrl-C that its processes already got from the terminal


class Stopped(Exception):
    """Training was asked to end early; its checkpoint is on disk. The message says how to resume."""


def single_process_launcher() -> int | None:
    """The id of the `accelerate launch` that started this process, if any.

    With a single process it dies of SIGTERM without forwarding it, and the orphaned process would keep training.
    """
    parent = os.getppid()
    try:
        command = " ".join(psutil.Process(parent).cmdline()[:4])
    except psutil.Error:
        return None
    return parent if re.search(r"python\S* .*accelerate\S*\W?launch", command) else None


@dataclass
class StopRequest:
    """Whether training was asked to stop, and why."""

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
            redirect_to_null(self.terminals)
        if self.signal_name is None:
            self.signal_name, self.noted_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.noted_at > ECHO_SECONDS:
            raise KeyboardInterrupt  # a second Ctrl-C: the user does not want to wait


def stopped(request: StopRequest, step: int, max_steps: int, checkpoints: Path) -> Stopped:
    return Stopped(
        f"{request.reason or 'another process was asked to stop'}: stopped after step {step} of {max_steps}, "
        f"checkpoint in {checkpoints}; the same command with --resume auto goes on"
    )


def redirect_to_null(terminals: list[int]) -> None:
    """Redirect output for a closed terminal to the null device, where writing raises no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block these signals are recorded instead of handled; the old handlers are restored afterwards."""
    request = StopRequest()
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


OUTCOME_SECONDS = 120.0


class Outcomes:
    """Numbers compared across processes without a collective: a failed pass may have left one pending."""

    def __init__(self) -> None:
        self.rounds = 0

    def smallest(self, number: int) -> int:
        """The smallest `number` over all processes.

        A process with 0 (failed) waits two minutes; a process that has not called by then is stuck in the pass.

        Raises:
            TimeoutError: Another process is stuck.
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
