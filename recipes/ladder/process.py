"""Runs a ladder command in a child process that ends with this one.

On a small machine a stage's imports take as long as a hundred training steps. A Python script therefore runs in a fork
of this process, which has already imported everything to check the settings (`recipes/ladder/preflight.py`); it gets
the arguments, environment and signal handlers of a fresh interpreter. Commands with a launcher start a new process
instead, as do all commands on a machine with an accelerator, whose driver does not survive a fork.
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

GRACE_SECONDS = 60.0  # for an interrupted stage to write its checkpoint
LAUNCHER_SECONDS = 300  # that torchrun gives its processes for the same before it kills them, by itself 30


class HoursOver(SystemExit):
    """`--max_hours` was reached; the running stage has saved."""


def stage_environment(verbose: bool) -> dict[str, str]:
    """Variables that control the stages' progress bars; some libraries read them at import."""
    environment = {}
    if verbose:
        environment |= {VERBOSE: "1"}
    else:  # only the stage's own progress line is shown
        environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not sys.stderr.isatty():  # a progress bar in a log file is one endless line
        environment |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return environment


def call(
    command: Sequence[str],
    environment: Mapping[str, str],
    again: str = "the same command",
    lock: int | None = None,
    silent: bool = False,
) -> int:
    """Run a command in its own process group, which is stopped with this process; returns its exit code.

    The command inherits the run's lock: if this process is killed, no second run can start beside the orphan.

    Args:
        command: Its words, optionally after `env NAME=value ...`.
        environment: Variables to add to this process's.
        again: What to run to continue after an interruption, for the message.
        lock: File descriptor to pass on.
        silent: Show only errors and the live progress line.

    Raises:
        UserError: Ctrl-C or a signal to this process interrupted it.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, stop)
    variables, words = split_variables(command)
    if words[0] == sys.executable and words[1].endswith(".py") and can_fork():
        return wait_for_fork(lambda: run_script(words[1:], {**environment, **variables}, silent), again)
    held = () if lock is None else (lock,)
    output = subprocess.DEVNULL if silent else None
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(LAUNCHER_SECONDS)}
    inherited = {**patience, **os.environ, **environment}
    with subprocess.Popen(command, env=inherited, process_group=0, pass_fds=held, stdout=output) as process:
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
    """Whether a fork saves imports and is safe: torch is loaded, there is no accelerator, no sandbox is running."""
    torch = sys.modules.get("torch")
    if torch is None or sys.platform != "linux" or sandbox_has_started():
        return False
    return not torch.accelerator.is_available()


def check_in_fork(check: Callable[[], None]) -> None:
    """Run `check` in a fork and re-raise its [`UserError`]; no other side effect reaches this process."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def send_error() -> None:
        try:
            check()
        except UserError as error:
            sender.send(str(error))

    if code := wait_for_fork(send_error, "the same command"):
        raise SystemExit(code)  # the fork has printed a traceback
    if receiver.poll():
        raise UserError(receiver.recv())


def wait_for_fork(function: Callable[[], None], again: str) -> int:
    process = multiprocessing.get_context("fork").Process(target=lambda: in_fork(function))
    with warnings.catch_warnings():
        # The other threads belong to OpenBLAS and Arrow's allocator, both of which handle forks.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        process.start()
    with contextlib.suppress(OSError):  # parent and child both set it, in either order
        os.setpgid(process.pid, process.pid)
    with stopping(process.pid, again):
        process.join()
        return process.exitcode


def in_fork(function: Callable[[], None]) -> None:
    """Call `function` with a new process's process group, signal handlers and exit hooks."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()  # the parent's exit hooks must not run here
    try:
        function()
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them; trackers such as W&B flush there


def run_script(words: Sequence[str], environment: Mapping[str, str], silent: bool) -> None:
    """Run `python *words` within this process."""
    os.environ.update(environment)
    sys.argv[:] = words
    if "OMP_NUM_THREADS" in environment:  # torch reads it only at import
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if silent:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def stopping(pid: int, again: str) -> Iterator[None]:
    """Stop process `pid` and its descendants if this process is interrupted inside the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        started = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        closed = getattr(stopped, "code", None) == 128 + signal.SIGHUP  # the stage must know that its terminal is gone
        os.killpg(pid, signal.SIGHUP if closed else signal.SIGTERM)
        # Wait for all of them: a launcher may exit long before its workers have written a checkpoint.
        over = isinstance(stopped, HoursOver)  # nobody waits, and a large model takes minutes
        psutil.wait_procs(started, timeout=None if over else GRACE_SECONDS)
        if over:
            raise
        raise UserError(f"stopped; {again} continues from here") from stopped


def stop(number: int, frame: object) -> None:
    raise HoursOver if number == signal.SIGALRM else SystemExit(128 + number)


@contextlib.contextmanager
def time_limit(hours: float | None) -> Iterator[None]:
    """Raise [`HoursOver`] inside the block after so many hours; None: never."""
    if hours is not None:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, hours * 3600)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
