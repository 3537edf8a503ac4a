"""Runs untrusted programs in full CPython, for tasks whose solutions need it, such as HumanEval.

Each program is a process in its own user, network, process, mount and IPC namespaces (`jail.py`). It sees the
interpreter and the system's libraries, read-only, and an empty directory in memory; no network, no other process, no
/proc, no environment. Where the kernel forbids this, nothing runs: there is no weaker mode. Linux only.
"""

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from modeling_nanochat.errors import UserError

MAX_OUTPUT_BYTES = 16_000  # of each stream; the rest is read and dropped


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended, and the beginning of what it wrote.

    Args:
        ended: `exit` by itself; `signal`, killed by one; `timeout`, stopped by us.
        code: Its exit code, 0 for success; of a signal, its negative number.
    """

    ended: Literal["exit", "signal", "timeout"]
    code: int
    stdout: str
    stderr: str

    @property
    def succeeded(self) -> bool:
        return self.ended == "exit" and self.code == 0


@functools.cache
def check_full_python() -> None:
    """Raise [`UserError`] unless programs can be isolated here and then run."""
    result = run_program("print(6 * 7)", timeout=30.0)
    if result.stdout != "42\n":
        raise UserError(
            f"programs cannot run isolated here ({result.ended} {result.code}: {result.stderr.strip()[-200:]}): "
            f"the interpreter in {sys.base_prefix} must be readable by every user"
        )


def run_program(source: str, *, timeout: float = 5.0, memory: int = 256 * 2**20) -> ProgramResult:
    """Run `source` as a program and return how it ended.

    Args:
        timeout: Seconds until it and all that it started are killed.
        memory: Address space of each of its processes in bytes; there are at most 6.

    Raises:
        UserError: The kernel or the container forbids the namespaces, or this is not Linux.
    """
    if sys.platform != "linux":
        raise UserError("programs run in Linux namespaces only: leave out the task, or evaluate on Linux")
    with tempfile.TemporaryDirectory() as root:
        reader, writer = os.pipe()
        settings = {
            "root": root,
            "prefix": os.path.realpath(sys.base_prefix),
            "python": os.path.realpath(sys.executable),
            "status": writer,
            "seconds": math.ceil(timeout),
            "memory": memory,
        }
        with open(reader, "rb") as status:
            with open(writer, "wb"):
                process = start_jail(settings)
            return finish(process, status, source.encode(errors="surrogatepass"), timeout)


def start_jail(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [settings["python"], "-I", "-S", str(Path(__file__).with_name("jail.py")), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        pass_fds=(settings["status"],),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], status: IO[bytes], source: bytes, timeout: float) -> ProgramResult:
    """Hand over the source, collect output until the program ends or its time is over, and kill what is left."""
    deadline = time.monotonic() + timeout
    streams: dict[Any, bytes] = {process.stdout: b"", process.stderr: b"", status: b""}
    with process:
        try:
            with contextlib.suppress(BrokenPipeError):  # refused at once
                feed(process, source)
            in_time = collect(streams, deadline)
        finally:
            kill(process)
    report = json.loads(streams[status] or b"{}")
    if "refused" in report:
        raise UserError(
            f"programs cannot be isolated here ({report['refused']}): allow user namespaces, or leave out the task"
        )
    code = report.get("code", -signal.SIGKILL)
    timed_out = not in_time or code == -signal.SIGXCPU
    ended: Literal["exit", "signal", "timeout"] = "timeout" if timed_out else "signal" if code < 0 else "exit"
    out, err = (streams[pipe].decode(errors="replace") for pipe in (process.stdout, process.stderr))
    return ProgramResult(ended, code, out, err)


def feed(process: subprocess.Popen[bytes], source: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(source)
    process.stdin.close()


def collect(streams: dict[Any, bytes], deadline: float) -> bool:
    """Read the streams until all have ended, and return True, or until the deadline."""
    with selectors.DefaultSelector() as selector:
        for pipe in streams:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return False
            for key, _ in selector.select(seconds):
                data = os.read(key.fd, 2**16)
                streams[key.fileobj] += data[: MAX_OUTPUT_BYTES - len(streams[key.fileobj])]
                if not data:
                    selector.unregister(key.fileobj)
    return True


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the jail, whose first process takes all others with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
