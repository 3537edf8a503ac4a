"""What scripts read and print: dataclasses filled from `--config file.yaml` and the command line, and tables."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import UserError

VERBOSE = "NANOCHAT_VERBOSE"


def is_verbose() -> bool:
    """Whether scripts print everything: hyperparameters, every evaluation, tables; set by `run.py --verbose true`."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text with a rule under the first row; columns of figures are right-aligned."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligns = [str.rjust if all(cell[:1] in "+-0123456789" for cell in column[1:]) else str.ljust for column in columns]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    cells = [[align(cell, w) for align, cell, w in zip(aligns, line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as Markdown, the first row as header; all columns but the first are right-aligned."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises [`UserError`] instead of printing its usage and exiting with code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; run with --help to see every option")


def parse(*dataclass_types: type, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from the command line, read by TRL's `TrlParser`.

    Raises:
        UserError: The configuration file is missing or not YAML; or a key, there or on the command line, is missing,
            unknown or badly typed.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    args = list(sys.argv[1:] if args is None else args)
    config = config_path(args)
    parser = Parser(dataclass_types)  # type: ignore[arg-type]  # transformers' type of a dataclass fits no `type`
    try:
        if config:
            check_keys(config, {action.dest: action for action in parser._actions})
        return parser.parse_args_and_config(args=args)
    except (ValueError, TypeError) as error:
        where = f"{config}: " if config else ""
        raise UserError(f"{where}{str(error).splitlines()[0]}; run with --help to see every key") from error


def check_keys(config: str, known: dict[str, argparse.Action]) -> None:
    """Raise [`UserError`] unless the file is a YAML mapping of known keys, with lists where lists are expected.

    `TrlParser` would report missing keys first, and would split a single string into a list of letters.
    """
    import yaml

    try:
        with open(config, encoding="utf-8") as text:
            content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{config}: must be a YAML mapping of `key: value` lines")
    if unknown := sorted(str(key) for key in content if key not in known and key != "env"):
        close = difflib.get_close_matches(unknown[0], known, 1)
        meant = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{config}: unknown key {unknown[0]!r}{meant}; run with --help to see every key")
    for key, value in content.items():
        wants_list = key in known and known[key].nargs in ("+", "*")
        if wants_list and isinstance(value, str):
            raise UserError(f"{config}: {key} must be a list, write [{value}]")
        if not wants_list and isinstance(value, list):
            raise UserError(f"{config}: {key} must be a single value, not a list")
        choices = known[key].choices if key in known and value is not None else None
        if choices and (wrong := [item for item in (value if wants_list else [value]) if item not in choices]):
            raise UserError(f"{config}: {key} {wrong[0]!r} is not one of {', '.join(map(str, choices))}")


def config_path(args: list[str]) -> str | None:
    """The value of `--config`, checked to be a file; splits `--config=file` in place, for `TrlParser`."""
    for position, word in enumerate(args):
        if word.startswith("--config="):
            args[position : position + 1] = ["--config", word.removeprefix("--config=")]
    if "--config" not in args:
        return None
    position = args.index("--config") + 1
    path = args[position] if position < len(args) else ""
    if not os.path.isfile(path):
        raise UserError(f"--config {path}: no such file; the shipped ones are recipes/<recipe>/<stage>.yaml")
    return path
