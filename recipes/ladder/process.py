"""Runs a command of the ladder in a process of its own, which ends with this one.

A stage's imports take as long as a hundred of its steps on a small machine. So a Python script is run in a fork of this
process, which has them behind it since it checked the settings (`recipes/ladder/preflight.py`); it finds the arguments,
environment and signal handlers of a fresh interpreter. What a launcher starts is started anew, and so is everything
beside an accelerator, whose driver does not survive a fork.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil

from modeling_nanochat.chat.python_tool import sandbox_has_started
from modeling_nanochat.cli import VERBOSE
from modeling_nanochat.errors import UserError

GRACE_SECONDS = 60.0  # for a stage that was stopped to write its checkpoint


def stage_environment(verbose: bool) -> dict[str, str]:
    """Variables for the stages: whose progress bars are seen. The libraries read some of them when they are imported."""
    environment = {}
    if verbose:
        environment |= {VERBOSE: "1"}
    else:  # the stage's own line is the one that moves
        environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not sys.stderr.isatty():  # a progress bar in a file is one endless line
        environment |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return environment


def call(
    command: Sequence[str],
    environment: Mapping[str, str],
    again: str = "the same command",
    lock: int | None = None,
    silent: bool = False,
) -> int:
    """Exit code of a command in a process group of its own, which goes down with this process.

    The command holds the run's lock too: were this process killed, no second run could start beside its orphan.

    Args:
        command: As one would type it; `env NAME=value ...` may stand before it.
        environment: Variables besides those of this process.
        again: What goes on where this one was stopped.
        lock: Descriptor to be passed on.
        silent: Show errors and the live line only.

    Raises:
        UserError: It was stopped, by Ctrl-C or a signal to this process.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    variables, words = split_variables(command)
    if words[0] == sys.executable and words[1].endswith(".py") and can_fork():
        return wait_for_fork(lambda: run_script(words[1:], {**environment, **variables}, silent), again)
    held = () if lock is None else (lock,)
    output = subprocess.DEVNULL if silent else None
    with subprocess.Popen(
        command, env={**os.environ, **environment}, process_group=0, pass_fds=held, stdout=output
    ) as process:
        with stopping(process.pid, again):
            return process.wait()


def split_variables(command: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`env A=1 python x.py` -> `{"A": "1"}` and `python x.py`."""
    words = list(command)
    count = 1 if words[0] == "env" else 0
    while count and "=" in words[count]:
        count += 1
    return dict(word.split("=", 1) for word in words[1:count]), words[count:]


def can_fork() -> bool:
    """Whether a fork of this process saves imports and is safe: torch is loaded, no accelerator is there, no sandbox runs."""
    torch = sys.modules.get("torch")
    if torch is None or sys.platform != "linux" or sandbox_has_started():
        return False
    return not torch.accelerator.is_available()


def check_in_fork(check: Callable[[], None]) -> None:
    """Raise the [`UserError`] that `check` raises; nothing else of what it does is left in this process."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def told() -> None:
        try:
            check()
        except UserError as error:
            sender.send(str(error))

    if code := wait_for_fork(told, "the same command"):
        raise SystemExit(code)  # after a traceback
    if receiver.poll():
        raise UserError(receiver.recv())


def wait_for_fork(function: Callable[[], None], again: str) -> int:
    process = multiprocessing.get_context("fork").Process(target=lambda: in_fork(function))
    with warnings.catch_warnings():
        # The other threads are those of OpenBLAS and of Arrow's allocator, both of which provide for forks.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        process.start()
    with contextlib.suppress(OSError):  # whichever of the two processes comes first
        os.setpgid(process.pid, process.pid)
    with stopping(process.pid, again):
        process.join()
        return process.exitcode


def in_fork(function: Callable[[], None]) -> None:
    """Call `function` as a new process would: process group, signal handlers, and what libraries do at the end."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()  # what the parent is to do at its end is not for this process
    try:
        function()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out; trackers such as W&B send their last lines there


def run_script(words: Sequence[str], environment: Mapping[str, str], silent: bool) -> None:
    """What `python` does with these words, within this process."""
    os.environ.update(environment)
    sys.argv[:] = words
    if "OMP_NUM_THREADS" in environment:  # read when torch was loaded, and not again
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if silent:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def stopping(pid: int, again: str) -> Iterator[None]:
    """Take the process `pid` down, with what it has started, if this one is stopped within the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        started = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        closed = getattr(stopped, "code", None) == 128 + signal.SIGHUP  # the stage must know not to write there
        os.killpg(pid, signal.SIGHUP if closed else signal.SIGTERM)
        # a launcher may be gone long before what it launched has written its checkpoint
        psutil.wait_procs(started, timeout=GRACE_SECONDS)
        raise UserError(f"stopped; {again} goes on where this one was") from stopped


def stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
