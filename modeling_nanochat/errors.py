"""How a command ends: errors that the user can fix are one line, Ctrl-C and a closed output are no errors at all.

The imports of a command take seconds. While they run, Ctrl-C ends the process at once, without a traceback; scripts that are
run by their path do the same in two lines of their own, before the first library is imported.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

INTERRUPTED, PIPE_CLOSED = 128 + 2, 128 + 13  # what a shell reports of a process that ended by SIGINT or SIGPIPE


class UserError(Exception):
    """Something outside the code is wrong; the message says in one line what, where, and what to do."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a [`UserError`] becomes one line on stderr and exit code 1, without a traceback.

    So do Ctrl-C (exit code 130) and an output that nobody reads any more, as of `command | head` (141), without the line.
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
            if output_is_read(probe="\n"):  # it was another pipe
                raise
            sys.exit(PIPE_CLOSED)
        finally:
            if not output_is_read():
                # At exit Python writes what is left in the buffer again, and would complain.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C raises KeyboardInterrupt, unless it is ignored; before and after it a command may simply end."""
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
    """Whether standard output takes `probe` and what is buffered; without a buffer only a probe tells."""
    try:
        if sys.stdout is not None:  # as after `>&-`
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
    """Whether `package` is being imported to run `python -m package.module` or one of its commands, not by other code."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # only until Python has found the module
        return any(option == "-m" and name.split(".")[0] == package for option, name in pairwise(sys.orig_argv))
    return Path(program).stem in COMMANDS
