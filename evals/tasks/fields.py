"""Checks of the fields of a record, with errors that name file and line."""

from typing import Any

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages

MOST_CHOICES = 26  # letters


def is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def require_strings(record: dict[str, Any], fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if not isinstance(record[field], str):
            raise UserError(f"{where}: `{field}` must be a string, found {type(record[field]).__name__}")


def checked_choices(choices: Any, where: str) -> tuple[str, ...]:
    if not is_list_of_strings(choices) or not 2 <= len(choices) <= MOST_CHOICES:
        raise UserError(f"{where}: `choices` must hold 2 to {MOST_CHOICES} strings")
    return tuple(choices)


def require_index(value: Any, field: str, count: int, where: str) -> None:
    if type(value) is not int or not 0 <= value < count:
        raise UserError(f"{where}: `{field}` must be the index of a choice, 0 to {count - 1}, found {value!r}")


def history(record: dict[str, Any], where: str) -> list[dict]:
    """Return the messages before a record's question; empty if it has no `history`."""
    if record.get("history") in (None, []):
        return []
    check_messages(record["history"], f"{where}, `history`")
    last = record["history"][-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise UserError(f"{where}: `history` must end with an answer of the assistant; the question is the next turn")
    return record["history"]


def require_no_history(record: dict[str, Any], where: str) -> None:
    if record.get("history") not in (None, []):
        raise UserError(f"{where}: only questions that are answered in words can have a `history`; leave it out")
