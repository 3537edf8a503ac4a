"""Checks of fields in records that a user wrote."""

from typing import Any

from modeling_nanochat.errors import UserError


def is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def require_strings(record: dict[str, Any], fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if not isinstance(record[field], str):
            raise UserError(f"{where}: `{field}` must be a string, found {type(record[field]).__name__}")


def require_index(value: Any, field: str, count: int, where: str) -> None:
    if type(value) is not int or not 0 <= value < count:
        raise UserError(f"{where}: `{field}` must be the index of a choice, 0 to {count - 1}, found {value!r}")
