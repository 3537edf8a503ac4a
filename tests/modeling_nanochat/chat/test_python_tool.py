import math
import random
import sys
import time

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
        ("class A:\n    def __repr__(self): return 'mine'\n[A()]", "[mine]"),
        ("class A:\n    def __str__(self): return 'mine'\nA()", "mine"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n{1: P(3)}", "{1: P(x=3)}"),
        ("print = str = type = 5\n6", "6"),
        ("def print(x): return 7\nprint(1)", "7"),
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
        ("raise ValueError('> 16000 bytes')", "ValueError: > 16000 bytes"),
        ("raise ValueError('time limit exceeded')", "ValueError: time limit exceeded"),
        ("raise TimeoutError('feed time limit exceeded: 2s > 1s')", "TimeoutError: feed time limit exceeded: 2s > 1s"),
        ("raise MemoryError('memory limit exceeded')", "MemoryError: memory limit exceeded"),
        ("raise ValueError", "ValueError"),
        ("print(1, end='')\n{}['a']", "1\nKeyError: 'a'"),
        ("class A:\n    def __str__(self): raise ValueError('no')\nA()", "ValueError: no"),
        ("try:\n    while True: pass\nexcept BaseException: pass", "TimeoutError: stopped after 0.2 s"),
        ("try:\n    'a' * 10**10\nexcept BaseException: pass", "MemoryError: more than 64 MB"),
        ("x = 'a' * 10**7\n[x] * 1000", "MemoryError: more than 64 MB"),
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
    assert len(run_python("'a' * 5000")) == MAX_OUTPUT_CHARACTERS
    assert run_python("print('b' * 1000000)").endswith("b...")
    flooded = run_python("while True: print('x')", timeout=0.2)
    assert flooded.startswith("x\nx\n") and flooded.endswith("...\nTimeoutError: stopped after 0.2 s")
    failed = run_python("print('x' * 50000)\n1/0")
    assert failed.endswith("...\nZeroDivisionError: division by zero") and len(failed) == MAX_OUTPUT_CHARACTERS
    assert len(run_python("raise ValueError('x' * 10**7)")) == MAX_OUTPUT_CHARACTERS


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
    # not the one that runs already
    monkeypatch.setattr(python_tool, "sandbox_pool", python_tool.sandbox_pool.__wrapped__)
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(UserError, match="pip install pydantic-monty"):
        check_sandbox()
    with pytest.raises(UserError):
        run_python("1+1")


def test_an_interpreter_that_does_not_start_is_one_line(monkeypatch):
    monkeypatch.setattr(python_tool, "sandbox_pool", python_tool.sandbox_pool.__wrapped__)
    monkeypatch.setenv("MONTY_BIN", "/nowhere/monty")
    with pytest.raises(UserError, match=r"cannot start pydantic-monty \(.*nowhere.*\): install it") as raised:
        check_sandbox()
    assert "\n" not in str(raised.value)


# What CPython computes and the interpreter does not: told in the docstring of `run_python` and in README.md. A new
# release that changes the list changes what the tool's users are told.
DIFFERENT = {
    "pow(3, -1, 7)": "ValueError: pow() 2nd argument cannot be negative when 3rd argument specified",
    "(0.1).as_integer_ratio()": "AttributeError: 'float' object has no attribute 'as_integer_ratio'",
    "(255).bit_length()": "AttributeError: 'int' object has no attribute 'bit_length'",
}
NUMBERS = """2**1000; 7**77 % 10**9; -7 // 2; -7 % 3; divmod(-7, 2); divmod(7.5, 2); 1e16 + 1; 0.1 + 0.2; 1/3; 1e-5
1e308 * 10; round(0.5); round(1.5); round(-2.5); round(2.5, 0); round(1234.5678, -2); round(1250, -2); round(2.675, 2)
round(1.5, 400)
round(0.285, 2); round(-1.005, 2); round(1e22, 2); round(5, 2); round(True, 1); round(2.675, ndigits=2); round(7.0)
round(1e300, 22); round(5e-324, 20); round(123.456, 30); int(-3.7); 10**22 / 3; abs(-0.0); (-8) ** (1/3)
sum([0.1] * 10); hex(255); 3+4j; int('12', 5); float('1e3'); 1_000; 0x10; min(1, 2.0); 10**400 // 10**399; int(1e20)
-5.5 // 2; 5.5 % -2; f'{1234567.891:,.2f}'; f'{0.000012:g}'; f'{2.675:.2f}'; f'{0.5:.0f}'; f'{1e22:f}'; 1e400"""


def expressions():
    """Arithmetic as models write it, the same in every run."""
    yield from DIFFERENT
    yield from NUMBERS.replace("\n", "; ").split("; ")
    draw = random.Random(0)
    for _ in range(100):
        a, b, c = (
            draw.choice([draw.randrange(100), draw.randrange(10**9), draw.randrange(10**4) / 100]) for _ in "abc"
        )
        yield f"{a} {draw.choice('+-*/')} {b} {draw.choice(['+', '-', '*', '//', '%'])} {c or 1}"
        yield f"({a} - {b}) ** {draw.choice([-2, -1, 0.5, 2, 3, 11])}"
        yield f"'{{:{draw.choice(['.2f', ',', '.3e', 'g', '.1%'])}}}'.format({a})"
        yield f"round({draw.randrange(1000)}.{draw.randrange(100):02}5, 2)"
        yield f"round({a} * {c} / 7, {draw.choice([0, 1, 2, 3])})"
    for name in ("sqrt", "sin", "cos", "tan", "log10", "log", "exp", "floor", "ceil", "atan"):
        yield from (f"math.{name}({value})" for value in (0.1, 0.5, 2, 10, 12.345))


def in_cpython(expression):
    try:
        return str(eval(expression, {"math": math}))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_the_numbers_are_cpythons_except_for_known_ones():
    shown = {expression: run_python(f"import math\n{expression}") for expression in expressions()}
    assert {each: text for each, text in shown.items() if text != in_cpython(each)} == DIFFERENT
