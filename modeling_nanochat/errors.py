"""Errors that the person at the keyboard can put right, told in one line."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something outside the code is wrong; the message says in one line what, where, and what to do."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a [`UserError`] becomes one line on stderr and exit code 1, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
