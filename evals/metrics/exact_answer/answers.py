"""The answer after `####` in a reply, read as a number or, for comparison, by nanochat's rule for strings."""

import re
from decimal import Decimal
from typing import Literal

Grading = Literal["number", "original"]
MAX_DIGITS = 100  # commas included; more is no answer

NUMBER = re.compile(
    rf"""(?<!\#)\#\#\#\#[ \t]*
    (?P<sign>[-+−]?)[$€£¥]?(?P<sign_after_currency>[-+−]?)
    (?P<number>[0-9][0-9,]{{0,{MAX_DIGITS}}}(?:\.[0-9]{{0,{MAX_DIGITS}}})?|\.[0-9]{{1,{MAX_DIGITS}}})
    (?!\w|[.,][0-9]|[ \t]+[0-9]|[ \t]*[-+*/^:=−×÷][ \t]*[0-9])  # 19/2, 1 234 and 5 - 3 are not 19, 1 and 5
    """,
    re.VERBOSE,
)
ORIGINAL = re.compile(r"#### (-?[0-9.,]+)")


def extract_answer(text: str, grading: Grading = "number") -> str | None:
    """Return the first answer in `text`; two answers are the same if these strings are equal. None if there is none.

    Args:
        text: A reply, or a worked answer of a data set.
        grading: `number`: thousands separators, a currency, a plus, leading and trailing zeros and a final full stop
            do not matter: `#### $1,234.50.` is "1234.5". A number that goes on in another way, such as `19/2` or
            `1 234`, is no answer. `original`: whatever digits, commas and points follow `#### ` (exactly one space),
            commas removed: "17." and "17.0" differ from "17".
    """
    if grading == "original":
        match = ORIGINAL.search(text)
        return match[1].replace(",", "") if match else None
    if (match := NUMBER.search(text)) is None or (match["sign"] and match["sign_after_currency"]):
        return None
    plain = f"{Decimal(match['number'].replace(',', '')):f}"  # exact; ".5" and "007" are "0.5" and "7"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    negative = {match["sign"], match["sign_after_currency"]} & {"-", "−"}
    return f"-{plain}" if negative and plain != "0" else plain
