"""How a command ends: errors the user can fix are reported in one line; Ctrl-C and a closed output are not errors.

A command's imports take seconds. During them Ctrl-C ends the process at once, without a traceback; scripts run by path
do the same in two lines of their own, before they import the first library.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from textwrap import shorten

INTERRUPTED, PIPE_CLOSED = 128 + 2, 128 + 13  # a shell's exit codes for SIGINT and SIGPIPE


class UserError(Exception):
    """Something outside the code is wrong; the message says in one line what, where, and what to do."""


def one_line(error: BaseException) -> str:
    """The message of another library's error, at most 300 characters; its type if it has none."""
    return shorten(str(error).strip() or type(error).__name__, 300, placeholder=" ...")


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; report a [`UserError`] as one line on stderr and exit with code 1, without a traceback.

    Ctrl-C exits with 130, and a closed output, as after `command | head`, with 141; both print nothing.
    """
    with interruptible():
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            if output_is_read(probe="\n"):  # another pipe broke
                raise
            sys.exit(PIPE_CLOSED)
        finally:
            if not output_is_read():
                # At exit Python flushes the buffer again and would report the closed pipe.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt within the block, unless SIGINT is ignored; outside it ends the process."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def output_is_read(probe: str = "") -> bool:
    """Whether standard output accepts `probe` and its buffer; with an empty buffer only a probe can fail."""
    try:
        if sys.stdout is not None:  # None after `>&-`
            sys.stdout.write(probe)
            sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True


COMMANDS = ("nanochat-chat", "nanochat-convert")


def end_on_interrupt() -> None:
    """Let SIGINT end the process, unless it is ignored; `exit_on_user_error` takes over once `main` runs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_imported_by_command(package: str) -> bool:
    """Whether `package` is imported by `python -m package.module` or one of its commands, not by other code."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until Python has found the module
        return any(option == "-m" and name.split(".")[0] == package for option, name in pairwise(sys.orig_argv))
    return Path(program).stem in COMMANDS
