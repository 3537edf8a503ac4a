"""A polite end: SIGTERM, as schedulers send before they kill, and Ctrl-C stop training after the step that is running."""

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

    @property
    def reason(self) -> str | None:
        if self.signal_name:
            return f"{self.signal_name} received"
        return "the launcher has ended" if self.launcher not in (None, os.getppid()) else None

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self.noted_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.noted_at > ECHO_SECONDS:
            raise KeyboardInterrupt  # a person who asks again does not want to wait


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGINT are noted instead of obeyed; afterwards all is as before."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
