from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.metrics.exact_answer.answers import MAX_DIGITS, extract_answer

numbers = st.decimals(min_value=-(10**30), max_value=10**30, places=6).map(lambda number: f"{number:f}")


@given(
    number=numbers,
    commas=st.booleans(),
    zeros=st.integers(0, 5),
    before=st.text(st.characters(exclude_characters="#"), max_size=20),
    spaces=st.sampled_from(["", " ", "  ", "\t"]),
    currency=st.sampled_from(["", "$", "€"]),
    after=st.sampled_from(
        ["", ".", "!", "%", " apples", " apples, not 3.", "/hour", "**", "\n5", ",", ")", " - done"]
    ),
)
def test_however_a_number_is_written_it_is_the_same_answer(number, commas, zeros, before, spaces, currency, after):
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, _, fraction = digits.partition(".")
    whole = f"{int(whole):,}" if commas else "0" * zeros + whole
    reply = f"{before}####{spaces}{sign}{currency}{whole}.{fraction}{'0' * zeros}{after}"
    found = extract_answer(reply)
    assert found is not None and Decimal(found) == Decimal(number)
    assert found == extract_answer(f"#### {number}")


@given(a=numbers, b=numbers)
def test_different_numbers_are_different_answers(a, b):
    assert (extract_answer(f"#### {a}") == extract_answer(f"#### {b}")) == (Decimal(a) == Decimal(b))


@given(st.text(st.sampled_from("#$-+0123456789.,/ \t\n*x"), max_size=200))
def test_what_is_found_is_always_a_plain_number(text):
    found = extract_answer(text)
    if found is not None:
        assert found == f"{Decimal(found).normalize():f}" or len(found) > 28
        assert found != "-0" and not found.startswith(("+", "."))


@given(st.integers(-(10**9), 10**9))
def test_both_rules_read_a_plain_whole_number(number):
    assert extract_answer(f"So it is\n#### {number}") == extract_answer(f"#### {number}", "original") == str(number)


@pytest.mark.parametrize(
    "text",
    ["17", "#### ", "#### ,", "#### .", "#### 19/2", "#### 1 234", "#### 5 - 3", "#### 12:30", "#### 1.2.3",
     "#### 1.234,50", "#### 5e3", "#### 2x", "#### -$-3", "#### -", "##### 5", "### 5", "#### about 5", "#### ١٢",
     "#### inf", "#### 1_000"],
)  # fmt: skip
def test_what_is_no_number_or_goes_on_is_no_answer_rather_than_its_beginning(text):
    assert extract_answer(text) is None


def test_the_first_answer_counts():
    assert extract_answer("#### 8 and #### 9") == "8" and extract_answer("#### x, #### 9") == "9"


def test_very_long_numbers_are_no_answer_and_take_no_time():
    assert extract_answer(f"#### {'1' * MAX_DIGITS}") == "1" * MAX_DIGITS
    assert extract_answer(f"#### {'1' * 10**6}") is None and extract_answer(f"#### 0.{'1' * 10**6}") is None
    assert extract_answer("#### 1" + " " * 10**6 + "2") is None and extract_answer("####" * 10**5) is None
