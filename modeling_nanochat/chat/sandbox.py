"""The process between ours and the interpreters: it runs model-written code in pydantic-monty's workers.

It is a process of its own because pydantic-monty's threads do not survive a fork of ours, and because what its client
writes to stderr, warns about or allocates would be ours. Requests and replies are JSON, one per line; see
`python_tool.py` for the other end.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from .tool_source import LAST_VALUE, prepare_source

MAX_CALLS = 64  # at a time; each is a worker of 8 MB and its code's heap
MAX_OUTPUT_CHARACTERS = 1_000
KEPT = os.cpu_count() or 1  # workers that stay for further calls; those beyond serve one call each
GRACE_SECONDS = 0.5  # for the interpreter to notice that its time is over, before its process is killed

# Runs inside the interpreter. The code gets names of its own, so it cannot reach these; only bounded strings come out.
# Exceeding a limit cannot be caught there: every exception that leaves the interpreter is one. The interpreter's
# own `round` is wrong for a quarter of the numbers that end in 5, such as 2.675; its formatting is right.
PROGRAM = f"""
def rounded(number, ndigits=None):
    if type(number) is float and type(ndigits) is int and 0 < ndigits:
        return float(f"{{number:.{{min(ndigits, 323)}}f}}")
    return round(number, ndigits)
def execute(source, room):
    names = {{"__name__": "__main__", "round": rounded}}
    try:
        exec(source, names)
        value = names.get("{LAST_VALUE}")
        return None if value is None else str(value)[:room], None
    except BaseException as error:
        return None, (type(error).__name__ + ": " + str(error)[:room]).removesuffix(": ")
execute(source, room)
"""


class PrintedText:
    """The beginning of what the code prints; the rest is dropped."""

    def __init__(self, room: int):
        self.room, self.text = room, ""

    def __call__(self, stream: str, text: str) -> None:
        self.text += text[: self.room - len(self.text)]


def main() -> None:
    """Start the interpreters, then answer requests until our input ends; the first reply says whether they started."""
    warnings.simplefilter("ignore")  # about the code that is parsed
    try:
        interpreters = Interpreters()
    except Exception as error:  # for instance IndexError, if it is installed two folders below the root
        return Replies().send(id=None, text=repr(error))
    replies, reading = Replies(), threading.Lock()
    replies.send(id=None, text="")
    for _ in range(MAX_CALLS):
        threading.Thread(target=serve, args=(interpreters, reading, replies)).start()


class Interpreters:
    """Workers of pydantic-monty: a few that are kept, and more while many calls run at a time."""

    def __init__(self) -> None:
        from pydantic_monty import Monty

        settings: dict[str, Any] = {"max_processes": MAX_CALLS, "feed_duration_limit_grace": GRACE_SECONDS}
        self.kept = Monty(**settings).__enter__()
        self.others = Monty(**settings, min_processes=0, max_checkouts_per_worker=1).__enter__()
        self.free = threading.Semaphore(KEPT)

    @contextlib.contextmanager
    def session(self, timeout: float, max_memory: int) -> Iterator[Any]:
        keep = self.free.acquire(blocking=False)
        limits: Any = {"max_feed_duration_secs": timeout, "max_memory": max_memory}
        try:
            with (self.kept if keep else self.others).checkout(limits=limits, os_policy={"sleep": "zero"}) as session:
                yield session
        finally:
            if keep:
                self.free.release()


def serve(interpreters: Interpreters, reading: threading.Lock, replies: "Replies") -> None:
    """Read a request and answer it, repeatedly; while it is answered, another thread reads the next."""
    while True:
        with reading:
            line = sys.stdin.buffer.readline()
        if not line:
            kill_group()
        answer(interpreters, replies, **json.loads(line))


def kill_group() -> None:
    """Kill this process and its interpreters, which may be in the middle of a call."""
    if hasattr(os, "getpgid") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


class Replies:
    """Lines on standard output, from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def send(self, **reply: Any) -> None:
        with self.lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
            sys.stdout.buffer.flush()


def answer(interpreters: Interpreters, replies: Replies, id: int, **request: Any) -> None:
    try:
        text = run(interpreters, **request)
    except Exception as error:  # otherwise the caller would wait for its reply
        text = one_line(f"RuntimeError: {error!r}")
    replies.send(id=id, text=text)


def run(interpreters: Interpreters, code: str, timeout: float, max_memory: int) -> str:
    """Run `code` in an interpreter; returns what the tool shows, see `run_python`."""
    from pydantic_monty import MontyError

    try:
        code.encode()
    except UnicodeEncodeError:
        return "SyntaxError: the code contains half a surrogate pair"
    printed = PrintedText(MAX_OUTPUT_CHARACTERS + 1)
    value, error = None, None
    inputs = {"source": prepare_source(code), "room": MAX_OUTPUT_CHARACTERS + 1}
    try:
        with interpreters.session(timeout, max_memory) as session:
            value, error = session.feed_run(PROGRAM, inputs=inputs, print_callback=printed)
    except MontyError as raised:
        error = limit_line(raised, timeout, max_memory)
    return format_output(printed.text, value, error)


def limit_line(raised: Any, timeout: float, max_memory: int) -> str:
    """The limit that the code has exceeded, with its value, or what is wrong with the interpreter."""
    kind = raised.exception()
    if getattr(raised, "timed_out", False) or isinstance(kind, TimeoutError):
        return f"TimeoutError: stopped after {timeout:g} s"
    if isinstance(kind, MemoryError):
        return f"MemoryError: more than {max_memory // 2**20} MB"
    return raised.display("type-msg") if hasattr(raised, "display") else f"RuntimeError: {raised}"


def format_output(printed: str, value: str | None, error: str | None) -> str:
    """Printed text, value and error, each on new lines; only the error is never cut to make room."""
    text = printed
    if value is not None:
        text += ("\n" if printed and not printed.endswith("\n") else "") + value
    last = one_line(error or "")
    room = MAX_OUTPUT_CHARACTERS - len(last) - bool(last)
    text = text.rstrip("\n")
    if len(text) > room:
        text = (text[: max(room - 3, 0)] + "...")[: max(room, 0)]
    return "\n".join(part for part in (text, last) if part)


def one_line(error: str) -> str:
    return " ".join(error.split())[:MAX_OUTPUT_CHARACTERS]
