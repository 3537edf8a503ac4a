import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_nanochat.chat.python_tool import run_python
from modeling_nanochat.chat.tool_source import LAST_VALUE, assign_last_expression, prepare_source


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (" 5 - 3 ", "2"),
        ("    x = 5\n    x - 3", "2"),
        ("\n\n  if 1:\n    x = 4\n  x", "4"),
        ("\t1 + 1", "2"),
        ("\ufeff7", "7"),
        ("x = 3; x * 2", "6"),
        ("x = 3; x * 2;", "6"),
        ("5 # five", "5"),
        ("5\n# the end\n\n", "5"),
        ("'''a\nb'''", "a\nb"),
        ("x = '''\n'''\n(\n1,\n)\n", "(1,)"),
        ("1, 2", "(1, 2)"),
        ("*'ab', 3", "('a', 'b', 3)"),
        ("(x := 5)", "5"),
        ("x = 'é'; ('é'\n 'b') # ü", "éb"),
        ("a = 1\r\na + 1\r\n", "2"),
        ("a = 1\ra + 1\r", "2"),
        ("a = '\x0c\u2028\x85'\nlen(a)", "3"),
        ("5\x0c", "5"),
        ("'\\d'", "\\d"),
        ("1if 1else 2", "1"),
        ("if True: 5", ""),
        ("for x in [1]:\n    x", ""),
        ("def f():\n    'documented'\n    5\nf()", ""),
        ("x = 5", ""),
        ("# nothing", ""),
        ("print(1)", "1"),
    ],
)
def test_the_last_expression_is_shown_wherever_it_stands(code, shown):
    assert run_python(code) == shown


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1,000+1", "1001"),
        ("1,234,567 * 2", "2469134"),
        ("(1,000.50 + .5) / 1", "1001.0"),
        (" 12,000/3 ", "4000.0"),
        ("1,000**2", "1000000"),
        ("100,200", "100200"),
        # everything else is Python
        ("1,2", "(1, 2)"),
        ("(1, 2)", "(1, 2)"),
        ("1, 000", "(1, 0)"),
        ("0,123", "(0, 123)"),
        ("1,0000", "(1, 0)"),
        ("1234,000", "(1234, 0)"),
        ("1.5,000", "(1.5, 0)"),
        ("1,000+(1,2)", "TypeError: "),
        ("x = 1,000\nx", "(1, 0)"),
        ("[1,000]", "[1, 0]"),
        ("max(1,000)", "1"),
        ("'1,000'", "1,000"),
    ],
)
def test_thousands_separators_in_arithmetic_are_read_as_the_calculator_reads_them(code, shown):
    text = run_python(code)
    assert text.startswith(shown) if shown.endswith(": ") else text == shown


@pytest.mark.parametrize(
    "code",
    [
        "(",
        "1 +",
        "x = = 1",
        "\x00",
        "'\ud800'",
        "(" * 5000,
        "-" * 9999 + "1",
        "[" * 4000 + "]" * 4000,
        "a." * 4999 + "a",
    ]
    + [
        "not " * 2499 + "1",
        "lambda: " * 1200 + "1",
        "1 if 1 else " * 800 + "1",
        "f(" * 3000 + ")" * 3000,
        "if 1:\n" * 99,
    ],
    ids=repr,
)
def test_code_that_cannot_be_parsed_is_left_to_the_sandbox(code):
    prepared = prepare_source(code)
    assert prepared in (code, f"{LAST_VALUE} = ({code})")
    shown = run_python(code)
    assert shown.startswith(("SyntaxError: ", "NameError: ", "RecursionError: ")) or shown == ""


STATEMENTS = [
    "x = 1",
    "x",
    "(x)",
    "'é\\n'",
    "'''a\nb'''",
    "f(\n1,\n2)",
    "if x:\n  y",
    "(1\n)",
    "x; y",
    "x;",
    "# c",
    "",
    "a, b",
]


@given(st.lists(st.sampled_from(STATEMENTS), max_size=6), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_only_the_last_expression_changes_and_no_line_moves(statements, line_end):
    code = line_end.join(statements)
    before, after = ast.parse(code).body, ast.parse(assign_last_expression(code)).body
    if before and isinstance(before[-1], ast.Expr):
        assert isinstance(after[-1], ast.Assign) and ast.dump(after[-1].value) == ast.dump(before[-1].value)
    else:
        assert [ast.dump(each) for each in after] == [ast.dump(each) for each in before]
    assert [each.lineno for each in after] == [each.lineno for each in before]
    assert [ast.dump(each) for each in after[:-1]] == [ast.dump(each) for each in before[:-1]]
