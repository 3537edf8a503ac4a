"""A polite end: after the step that is running, training stops for SIGTERM, which schedulers send before they kill, for
Ctrl-C, and for SIGHUP, when the terminal is closed."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import psutil

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
