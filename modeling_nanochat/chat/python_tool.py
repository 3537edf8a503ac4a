"""The python tool: runs model-written code in an isolated interpreter and returns its visible output.

The interpreter is pydantic-monty: worker processes without file system, network or environment, with limits on time
and memory. There is no fallback: if it is missing, the tool refuses to run.
"""

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NoReply
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UserError
from .sandbox import MAX_CALLS, MAX_OUTPUT_CHARACTERS

__all__ = [
    "MAX_CODE_CHARACTERS",
    "MAX_OUTPUT_CHARACTERS",
    "check_sandbox",
    "python",
    "run_python",
    "sandbox_has_started",
]

MAX_CODE_CHARACTERS = 10_000
START_SECONDS = 60.0
REPLY_SECONDS = 10.0  # beyond the code's own limit: then the sandbox itself is stuck, and is replaced
# The only environment variables that the sandbox's processes inherit.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "MONTY_BIN", "SYSTEMROOT")
PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__package__}.sandbox import main; main()"


def check_sandbox() -> None:
    """Raise [`UserError`] unless the isolated interpreter is installed and starts."""
    sandbox_pool(os.getpid()).live_sandbox()


def sandbox_has_started() -> bool:
    """Whether this process has started interpreters."""
    return sandbox_pool(os.getpid()).sandbox is not None


def python(code: str) -> str:
    """Run Python code and return what it prints and the value of its last expression.

    Args:
        code: The Python code, for example `12 * 7`.
    """
    return run_python(code)


def run_python(code: str, *, timeout: float = 1.0, max_memory: int = 64 * 2**20) -> str:
    """Run `code` in the isolated interpreter and return its output.

    The interpreter is not CPython: it lacks `del`, `yield`, inheritance, most of the standard library and some
    methods; code that needs them gets an error. Its numbers are CPython's, as far as a test compares them.

    Args:
        code: Python source, which may be indented as a whole. The value of a trailing expression is shown, as in a
            notebook, also before a final `;`. In a line of nothing but digits, `+ - * / . ( )`, spaces and commas,
            commas that all separate groups of three digits are thousands separators, as in the original's
            calculator: `1,000+1` is 1001.
        timeout: Seconds of computation; `time.sleep` returns at once.
        max_memory: Heap in bytes.

    Returns:
        Printed text and the `str` of the last value: `19`, `5.0`. An error is one line after the printed text:
        `ZeroDivisionError: division by zero`. At most 1,000 characters; empty for code that shows nothing. At most 64
        calls run at a time; a further one waits `timeout` seconds, then returns `TimeoutError: the tool is busy ...`.

    Raises:
        UserError: pydantic-monty is not installed or cannot start.
    """
    if len(code) > MAX_CODE_CHARACTERS:
        return f"SyntaxError: the code is longer than {MAX_CODE_CHARACTERS} characters"
    return sandbox_pool(os.getpid()).run(code, timeout, max_memory)


@functools.cache
def sandbox_pool(process_id: int) -> "SandboxPool":
    """The interpreters of this process: a fork must not share its parent's."""
    return SandboxPool()


class SandboxPool:
    """Calls from any thread to one sandbox process, started by the first and replaced when it dies.

    No call waits for another caller's: each has an interpreter of its own, up to MAX_CALLS.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slots = threading.BoundedSemaphore(MAX_CALLS)
        self.sandbox: Sandbox | None = None
        if hasattr(os, "register_at_fork"):
            pool = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: close_inherited(pool()))

    def run(self, code: str, timeout: float, max_memory: int) -> str:
        if not self.slots.acquire(timeout=timeout):
            return f"TimeoutError: the tool is busy: {MAX_CALLS} calls have been running for {timeout:g} s"
        try:
            return self.live_sandbox().call(timeout, code=code, max_memory=max_memory)
        finally:
            self.slots.release()

    def live_sandbox(self) -> "Sandbox":
        """The sandbox, started if there is none; raises [`UserError`] if it cannot be."""
        with self.lock:
            if self.sandbox is not None and self.sandbox.process.poll() is not None:
                self.sandbox.kill()
                self.sandbox = None
            if self.sandbox is None:
                if importlib.util.find_spec("pydantic_monty") is None:
                    raise UserError("the python tool needs pydantic-monty: pip install pydantic-monty")
                self.sandbox = Sandbox()
            return self.sandbox


def close_inherited(pool: SandboxPool | None) -> None:
    """Close a fork's copies of its parent's pipes, whose end must be seen when the parent ends."""
    if pool is not None and pool.sandbox is not None:
        pool.sandbox.requests.close()
        pool.sandbox.replies.close()


class Sandbox:
    """The sandbox process and a thread that delivers its replies to the callers.

    Raises:
        UserError: It does not start.
    """

    def __init__(self) -> None:
        self.process = start_process()
        self.requests: Any = self.process.stdin
        self.replies: Any = self.process.stdout
        self.lock, self.numbers = threading.Lock(), count()
        started: Future[str] = Future()
        self.waiting: dict[int | None, Future[str]] = {None: started}
        # Not a method: once nobody refers to this object it is collected, and its process sees the end of its input.
        threading.Thread(target=deliver_replies, args=(self.replies, self.waiting), daemon=True).start()
        problem = result_of(started, START_SECONDS)
        if problem != "":
            self.kill()
            raise UserError(
                f"the python tool cannot start pydantic-monty ({problem}): install it into a virtual environment"
            )

    def call(self, timeout: float, **request: Any) -> str:
        number, reply = next(self.numbers), Future[str]()
        self.waiting[number] = reply
        line = json.dumps({"id": number, "timeout": timeout, **request}).encode() + b"\n"
        with self.lock, contextlib.suppress(OSError, ValueError):  # it has died: no reply
            write_all(self.requests, line)
        text = result_of(reply, timeout + REPLY_SECONDS if self.process.poll() is None else 0)
        self.waiting.pop(number, None)
        if text is None:
            self.kill()
            return "RuntimeError: the interpreter crashed"
        return text

    def kill(self) -> None:
        """End the process and its interpreters."""
        with contextlib.suppress(OSError):  # it has ended
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()
        with self.lock:
            self.requests.close()


def start_process() -> subprocess.Popen[bytes]:
    """Start `sandbox.main` with our import path, in its own session, so that Ctrl-C does not reach it."""
    root = Path(__file__).parents[len(__package__.split("."))]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM, json.dumps([str(root), *sys.path])],
        bufsize=0,  # a fork must find neither locks nor unwritten bytes
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        start_new_session=True,
    )


def write_all(pipe: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[pipe.write(rest) :]


def deliver_replies(pipe: Any, waiting: dict[int | None, Future[str]]) -> None:
    """Set the result of each waiting call from its line; at the end of the lines, cancel those that remain."""
    rest = b""
    with pipe:
        while chunk := pipe.read(2**16):
            *lines, rest = (rest + chunk).split(b"\n")
            for reply in map(json.loads, lines):
                if future := waiting.pop(reply["id"], None):
                    future.set_result(reply["text"])
    for future in list(waiting.values()):
        future.cancel()


def result_of(future: Future[str], seconds: float) -> str | None:
    """The result, or None if it does not come within `seconds`, or at all."""
    try:
        return future.result(seconds)
    except (NoReply, CancelledError):
        return None
