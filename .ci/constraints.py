"""Write the installed versions to constraints.txt, a Space's to space/requirements.txt, ruff's to its hooks.

Run by `make constraints` in a fresh environment with the newest versions that pyproject.toml allows.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

from libraries import ROOT, name_of, read_constraints, read_project

# pip, this project, and the dependencies of torch's CUDA build, which torch itself pins exactly.
LEFT_OUT = re.compile(r"pip|modeling-nanochat|nvidia-.*|cuda-.*|triton")
HEADER = (
    "# Versions that passed the tests, written by `make constraints`: pip install -c constraints.txt -e '.[all]'\n"
)
SPACE_HEADER = (
    "# The versions of ../constraints.txt, written by `make constraints`; gradio comes with README.md's sdk_version.\n"
)


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit("make constraints needs Python 3.11, the oldest supported; newer ones can install the same versions")
    installed = {name_of(found.name): found.version for found in metadata.distributions()}
    (ROOT / "constraints.txt").write_text(constraints(installed), encoding="utf-8")
    pins = read_constraints()
    (ROOT / "space" / "requirements.txt").write_text(space_requirements(read_project(), pins), encoding="utf-8")
    set_version(ROOT / "space" / "README.md", "sdk_version: ", pins["gradio"])
    set_version(ROOT / ".pre-commit-config.yaml", "    rev: v", pins["ruff"])


def constraints(installed: dict[str, str]) -> str:
    """The text of constraints.txt; `2.13.0+cpu` becomes 2.13.0, which every build of 2.13.0 satisfies."""
    kept = sorted(name for name in installed if not LEFT_OUT.fullmatch(name))
    return HEADER + "".join(f"{name}=={installed[name].partition('+')[0]}\n" for name in kept)


def set_version(path: Path, before: str, version: str) -> None:
    """Replace the version on the lines of `path` that begin with `before`."""
    text = re.sub(rf"(?m)^({re.escape(before)})[\w.]+", rf"\g<1>{version}", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def space_requirements(project: dict, pins: dict[str, str]) -> str:
    """The text of a Space's requirements.txt: the package's own dependencies, and `spaces` for ZeroGPU."""
    names = [name_of(requirement) for requirement in project["dependencies"]]
    return SPACE_HEADER + "".join(f"{name}=={pins[name]}\n" for name in names) + "spaces\n"


if __name__ == "__main__":
    main()
