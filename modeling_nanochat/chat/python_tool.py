"""The python tool: runs model-written code in an isolated interpreter and returns its visible output.

The interpreter is pydantic-monty: worker processes without file system, network or environment, with limits on time
and memory. There is no fallback: if it is missing, the tool refuses to run.
"""

import functools
import os
from typing import Any

from ..errors import UserError

MAX_CODE_CHARACTERS = 10_000
MAX_OUTPUT_CHARACTERS = 1_000
MAX_PRINTED_BYTES = 16 * MAX_OUTPUT_CHARACTERS  # printing more than this stops the code


def check_sandbox() -> None:
    """Raise [`UserError`] unless the isolated interpreter is installed and starts."""
    sandbox_pool(os.getpid())


def sandbox_has_started() -> bool:
    """Whether this process has started interpreters, whose threads would be missing in a fork."""
    return sandbox_pool.cache_info().currsize > 0


def python(code: str) -> str:
    """Run Python code and return what it prints and the value of its last expression.

    Args:
        code: The Python code, for example `12 * 7`.
    """
    return run_python(code)


def run_python(code: str, *, timeout: float = 1.0, max_memory: int = 64 * 2**20) -> str:
    """Run `code` in the isolated interpreter and return its output.

    Args:
        code: Python source. The value of a trailing expression is shown, as in a notebook.
        timeout: Seconds of computation; `time.sleep` returns at once.
        max_memory: Heap in bytes.

    Returns:
        Printed text and the `str` of the last value: `19`, `5.0`. An error is one line after the printed text:
        `ZeroDivisionError: division by zero`. At most 1,000 characters; empty for code that shows nothing.

    Raises:
        UserError: pydantic-monty is not installed or cannot start.
    """
    pool = sandbox_pool(os.getpid())
    if len(code) > MAX_CODE_CHARACTERS:
        return f"SyntaxError: the code is longer than {MAX_CODE_CHARACTERS} characters"
    from pydantic_monty import CollectString, MontyError

    printed = CollectString(max_bytes=MAX_PRINTED_BYTES)
    limits = {"max_feed_duration_secs": timeout, "max_memory": max_memory}
    error = ""
    try:
        with pool.checkout(limits=limits, os_policy={"sleep": "zero"}) as session:
            print_value(session, session.feed_run(code, print_callback=printed), printed)
    except MontyError as raised:
        error = error_line(raised, timeout, max_memory)
    return truncated_output(printed.output, error)


def print_value(session: Any, value: Any, printed: Any) -> None:
    """Print the last value inside the sandbox: here, `str` of a value that contains itself many times never ends."""
    from pydantic_monty import MontyClassProxy

    if value is None:
        return
    if isinstance(value, MontyClassProxy):  # an instance of a class in the code, which cannot be sent back
        value = f"<{value.name} object>"
    new_line = "print()\n" if printed.output and not printed.output.endswith("\n") else ""
    session.feed_run(new_line + "print(value)", inputs={"value": value}, print_callback=printed)


def error_line(error: Exception, timeout: float, max_memory: int) -> str:
    """`Type: message` in one line; limits are stated with their values, and truncated output is not an error."""
    text = error.display("type-msg") if hasattr(error, "display") else f"RuntimeError: {error}"
    if "time limit exceeded" in text or getattr(error, "timed_out", False):
        return f"TimeoutError: stopped after {timeout:g} s"
    if f"> {MAX_PRINTED_BYTES} bytes" in text:
        return ""
    if text.startswith("MemoryError") and "memory limit" in text:
        return f"MemoryError: more than {max_memory // 2**20} MB"
    return " ".join(text.split())


def truncated_output(printed: str, error: str) -> str:
    room = MAX_OUTPUT_CHARACTERS - len(error) - 1
    text = printed.rstrip("\n")
    if len(text) > room:
        text = text[: max(room - 3, 0)] + "..."
    return "\n".join(part for part in (text, error[:MAX_OUTPUT_CHARACTERS]) if part)


@functools.cache
def sandbox_pool(process_id: int) -> Any:
    """The pool of interpreters, one per process, because a forked child must not share its parent's workers."""
    try:
        from pydantic_monty import Monty
    except ImportError as error:
        raise UserError("the python tool needs pydantic-monty: pip install pydantic-monty") from error
    try:
        return Monty().__enter__()
    except Exception as error:  # for instance IndexError, if it is installed two folders below the root
        raise UserError(
            f"the python tool cannot start pydantic-monty ({error!r}): install it into a virtual environment"
        ) from error
