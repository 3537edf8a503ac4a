import builtins
import time
from pathlib import Path

import pytest

from modeling_nanochat.chat import python_tool
from modeling_nanochat.chat.python_tool import MAX_OUTPUT_CHARACTERS, check_sandbox, python, run_python
from modeling_nanochat.errors import UserError


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("12+7", "19"),
        ("10/2", "5.0"),
        ("'strawberry'.count('r')", "3"),
        ("print('a')\n2", "a\n2"),
        ("print('a', end='')\n2", "a\n2"),
        ("x = 3\nx * 2", "6"),
        ("[1, 'a']", "[1, 'a']"),
        ("class A: pass\nA()", "<A object>"),
        ("x = 5", ""),
        ("None", ""),
        ("", ""),
    ],
)
def test_shows_what_a_notebook_shows(code, shown):
    assert run_python(code) == shown


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("print('before')\n1/0", "before\nZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("'a' * 10**10", "MemoryError: more than 64 MB"),
        ("while True: pass", "TimeoutError: stopped after 0.2 s"),
    ],
)
def test_errors_and_limits_are_one_line(code, shown):
    assert run_python(code, timeout=0.2) == shown


def test_syntax_errors_are_named():
    assert run_python("1+").startswith("SyntaxError: ")
    assert run_python("'\ud800'").startswith("SyntaxError: ")
    assert run_python("1" * 20_000).startswith("SyntaxError: ")


@pytest.mark.parametrize(
    "code", ["open('/etc/passwd').read()", "import os\nos.environ['PATH']", "import socket", "__import__('os')"]
)
def test_nothing_outside_can_be_reached(code):
    assert "Error: " in run_python(code)


def test_output_is_capped():
    assert len(run_python("'a' * 5000")) <= MAX_OUTPUT_CHARACTERS
    assert run_python("print('b' * 1000000)").endswith("...")
    assert (
        "stopped" in run_python("while True: print('x')", timeout=0.2) or len(run_python("print('x' * 50000)")) <= 1000
    )


def test_a_value_that_contains_itself_many_times_does_not_hang():
    started = time.monotonic()
    assert "Error: " in run_python("x = [1]\nfor _ in range(40): x = [x, x]\nx", timeout=0.2)
    assert time.monotonic() - started < 5


def test_sleep_does_not_hold_up_the_caller():
    started = time.monotonic()
    assert run_python("import time\ntime.sleep(9)\n1") == "1"
    assert time.monotonic() - started < 5


def test_one_run_leaves_nothing_for_the_next():
    run_python("secret = 1")
    assert run_python("secret").startswith("NameError: ")


def test_tool_has_the_schema_that_trl_reads():
    from transformers.utils import get_json_schema

    schema = get_json_schema(python)["function"]
    assert schema["name"] == "python"
    assert schema["parameters"]["required"] == ["code"]
    assert python("6*7") == "42"


def test_without_pydantic_monty_it_refuses(monkeypatch):
    real_import = builtins.__import__

    def no_monty(name, *args, **kwargs):
        if name.startswith("pydantic_monty"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    python_tool.sandbox_pool.cache_clear()
    monkeypatch.setattr(builtins, "__import__", no_monty)
    with pytest.raises(UserError, match="pip install pydantic-monty"):
        check_sandbox()
    with pytest.raises(UserError):
        run_python("1+1")


def test_an_interpreter_that_does_not_start_is_one_line(monkeypatch):
    """pydantic-monty looks for its source four folders above its own, which are not always there."""

    def start():
        return Path("/one/two").parents[4]

    monkeypatch.setattr("pydantic_monty.Monty", start)
    # not the one that runs already
    monkeypatch.setattr(python_tool, "sandbox_pool", python_tool.sandbox_pool.__wrapped__)
    with pytest.raises(UserError, match=r"cannot start pydantic-monty \(IndexError\(4\)\): install it"):
        check_sandbox()
