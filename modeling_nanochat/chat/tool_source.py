"""Prepares model-written code for the sandbox: indentation, thousands separators, the value of the last expression."""

import ast
import re
import textwrap

LAST_VALUE = "__last_value__"
ARITHMETIC = re.compile(r"[0-9+\-*/.() ,]*")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def prepare_source(code: str) -> str:
    """Code to execute: dedented, without thousands separators, its last expression assigned to `LAST_VALUE`.

    Line numbers stay as they are. Code that Python cannot parse keeps its last expression: the sandbox reports the
    error itself.
    """
    return assign_last_expression(without_thousands_separators(textwrap.dedent(code.removeprefix("\ufeff"))))


def without_thousands_separators(code: str) -> str:
    """`1,000+1` -> `1000+1`, as the original's calculator reads it.

    Only if the code is one line of digits, `+ - * / . ( )`, spaces and commas, in which every comma separates a group
    of three digits, the first of which does not start with 0. `(1, 2)`, `f(1,000)`, `[1,000]`, `x = 1,000` are Python.
    """
    if "," not in code or not ARITHMETIC.fullmatch(code.strip()):
        return code
    joined = THOUSANDS.sub(lambda number: number[0].replace(",", ""), code)
    return code if "," in joined else joined


def assign_last_expression(code: str) -> str:
    """`x = 3; x * 2` -> `x = 3; __last_value__ = (x * 2)`, if the last statement is an expression."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character
        return code
    if not statements or not isinstance(statements[-1], ast.Expr):
        return code
    last = statements[-1]
    source = code.encode()
    # `ast` counts columns in bytes; of all characters that end a line in `str`, only these two do in Python.
    lines = [0, *(line_end.end() for line_end in re.finditer(rb"\r\n?|\n", source))]
    start = lines[last.lineno - 1] + last.col_offset
    end = lines[(last.end_lineno or last.lineno) - 1] + (last.end_col_offset or 0)
    return f"{source[:start].decode()}{LAST_VALUE} = ({source[start:end].decode()}){source[end:].decode()}"
