"""Print a Markdown report on a set of libraries: versions that differ from the tested ones, failing tests by error.

python .ci/what_broke.py .venv-newest report.xml

Uses only the standard library, so that it also works after a failed installation.
"""

import re
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from libraries import name_of, read_constraints, read_project, requirements

MOST = 10  # tests listed per error


def main(venv: Path, report: Path) -> None:
    paths = [str(path) for path in venv.glob("lib/python*/site-packages")]
    installed = {name_of(found.name): found.version for found in metadata.distributions(path=paths)}
    project = read_project()
    ours = [name_of(requirement) for requirement in requirements(project, "all")]
    if report.is_file():
        sections = failures(ElementTree.parse(report).getroot())
    else:
        log = venv / "install.log"
        output = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        sections = ["The tests did not run.", "```", *output.splitlines()[-15:], "```"]
    print("\n".join([*versions(read_constraints(), installed, ours), "", *sections]))


def versions(tested: dict[str, str], installed: dict[str, str], ours: list[str]) -> list[str]:
    """A table of the libraries that differ from the tested version, direct dependencies first."""
    other = {name: version.partition("+")[0] for name, version in installed.items() if name in tested}
    changed = [name for name in other if other[name] != tested[name]]
    changed.sort(key=lambda name: (name not in ours, name))
    if not changed:
        return ["All libraries have the tested versions."]
    rows = [f"| {f'**{name}**' if name in ours else name} | {tested[name]} | {other[name]} |" for name in changed]
    return ["| library | tested | here |", "| --- | --- | --- |", *rows]


def failures(report: ElementTree.Element) -> list[str]:
    """The failing tests of a JUnit report grouped by error, the most frequent error first."""
    groups, cases = defaultdict(list), list(report.iter("testcase"))
    for case in cases:
        for outcome in [*case.iter("failure"), *case.iter("error")]:
            lines = (outcome.get("message") or "no message").splitlines()
            groups[re.sub(r"0x\w+|/\S+|\d+", "…", lines[0])].append(f"{case.get('classname')}.{case.get('name')}")
    lines = [f"{sum(map(len, groups.values()))} of {len(cases)} tests failed."]
    for error, tests in sorted(groups.items(), key=lambda group: -len(group[1])):
        more = [f"- and {len(tests) - MOST} more"] if len(tests) > MOST else []
        lines += ["", f"**{len(tests)} ×** `{error.replace('`', '´')}`", ""]
        lines += [*[f"- {test}" for test in tests[:MOST]], *more]
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
