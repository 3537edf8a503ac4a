"""A polite end: SIGTERM, as schedulers send before they kill, and Ctrl-C stop training after the step that is running."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Stopped(Exception):
    """Training was asked to end early; its checkpoint is on disk. The message says how to go on."""


@dataclass
class StopRequest:
    """The name of the signal that asked to stop, once one has come."""

    signal_name: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait


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
