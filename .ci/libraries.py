"""The sets of library versions to install, all derived from pyproject.toml.

tested: the versions in constraints.txt. ranges: the newest that pyproject.toml allows. oldest: its lower bounds.
newest: no upper bounds except torch's, which keeps CPU machines on a CPU build where one is available.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("tested", "ranges", "oldest", "newest")


def pip_arguments(libraries: str, project: dict, extra: str = "all") -> list[str]:
    """Arguments of `pip install` for one of SETS.

    Args:
        project: The table `[project]` of pyproject.toml.
    """
    wanted = requirements(project, extra)
    if libraries == "tested":
        return [*wanted, "--constraint", str(ROOT / "constraints.txt")]
    if libraries == "oldest":
        return [lower_bound(requirement) for requirement in wanted]
    if libraries == "newest":
        return [r if name_of(r) == "torch" else re.sub(r",?<[\w.]+", "", r) for r in wanted]
    return wanted


def requirements(project: dict, extra: str) -> list[str]:
    """The dependencies of the project and of an extra, including extras it refers to, without duplicates."""
    found = list(project["dependencies"])
    for requirement in project["optional-dependencies"][extra]:
        if name_of(requirement) == project["name"]:
            for other in re.search(r"\[(.*)\]", requirement)[1].split(","):
                found += requirements(project, other.strip())
        else:
            found.append(requirement)
    return list(dict.fromkeys(found))


def lower_bound(requirement: str) -> str:
    """`torch>=2.11,<2.14` as `torch==2.11`."""
    return re.sub(r">=([\w.]+).*", r"==\1", requirement)


def name_of(requirement: str) -> str:
    """The normalized distribution name of a requirement or of a line of constraints.txt."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_constraints() -> dict[str, str]:
    """The tested version of each distribution, by normalized name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name_of(name): version for name, version in pins}
