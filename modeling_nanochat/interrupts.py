"""Ctrl-C while the imports of a command run, which take seconds: the process ends at once, without a traceback.

Scripts that are run by their path do the same in two lines of their own, before the first library is imported.
"""

import signal
import sys
from itertools import pairwise
from pathlib import Path

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
