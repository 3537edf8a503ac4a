"""One idiom for every script: dataclasses, filled from `--config file.yaml`, each key overridable on the command line."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from .errors import UserError


def parse(*dataclass_types: type, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from the command line, read by TRL's `TrlParser`.

    Raises:
        UserError: The configuration file is missing or not YAML, or it or the command line has an unknown or badly
            typed key.
    """
    import yaml
    from trl import TrlParser

    args = list(sys.argv[1:] if args is None else args)
    config = config_path(args)
    parser = TrlParser(dataclass_types)
    try:
        return parser.parse_args_and_config(args=args)
    except yaml.YAMLError as error:
        raise UserError(f"{config}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error
    except (ValueError, TypeError) as error:
        reason = str(error).replace("Unknown arguments from config file: ", "unknown keys ").splitlines()[0]
        where = f"{config}: " if config else ""
        raise UserError(f"{where}{reason} Run with --help to see every key.") from error


def config_path(args: list[str]) -> str | None:
    """The value of `--config`, checked to be a file; `--config=file` is split in place, which `TrlParser` cannot read."""
    for position, word in enumerate(args):
        if word.startswith("--config="):
            args[position : position + 1] = ["--config", word.removeprefix("--config=")]
    if "--config" not in args:
        return None
    position = args.index("--config") + 1
    path = args[position] if position < len(args) else ""
    if not os.path.isfile(path):
        raise UserError(f"--config {path}: no such file; recipes/<recipe>/<stage>.yaml holds the shipped ones")
    return path
