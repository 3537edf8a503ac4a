"""Versions of the installed libraries, and which of them are not among the tested ones."""

import sys
from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "modeling-nanochat"


def warn_of_untested_versions() -> None:
    """Print a warning to stderr for each such library; `chat/self_check.py` finds out whether it breaks a model."""
    for warning in untested_versions():
        print(f"warning: {warning}", file=sys.stderr)


def untested_versions() -> list[str]:
    """A line for each installed library that is older or newer than the tested versions."""
    lines = [
        f"{need.name} {installed} is not among the tested versions ({need.specifier})"
        for need in requirements()
        if (installed := version(need.name)) and not need.specifier.contains(installed, prereleases=True)
    ]
    return list(dict.fromkeys(lines))  # extras repeat requirements


def installed_versions() -> str:
    names = ("torch", "transformers", "tokenizers", "accelerate", "trl")
    return ", ".join(f"{name} {installed}" for name in names if (installed := version(name)))


def requirements() -> list[Requirement]:
    """This package's requirements, extras included; empty if it is used without being installed."""
    try:
        return [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return []


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
