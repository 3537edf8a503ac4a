import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import constraints
import install
import libraries
import pytest
import what_broke
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = libraries.read_project()
PINS = libraries.read_constraints()
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
INTERFACES = ("transformers", "trl", "accelerate")  # whose model or trainer interface we implement
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def parsed(libraries_set: str) -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in libraries.pip_arguments(libraries_set, PROJECT):
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def commands(workflow: dict) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def pip_that(tmp_path: Path, script: str) -> Path:
    """An environment whose Python is a shell script that notes its arguments and does what is asked."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\n{script}\n')
    python.chmod(0o755)
    return tmp_path / "venv"


# The sets of libraries


def test_all_asks_for_every_library_of_the_extras_that_it_names():
    named = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for extra in ("train", "eval", "space", "test"):
        named |= {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    assert set(parsed("ranges")) == named - {PROJECT["name"]}


def test_a_library_has_the_same_range_wherever_it_is_asked_for():
    for name, found in parsed("ranges").items():
        assert len({requirement.specifier for requirement in found}) == 1, name


def test_the_oldest_set_is_every_lower_bound():
    ranges = parsed("ranges")
    oldest = parsed("oldest")
    assert oldest.keys() == ranges.keys()
    for name, found in oldest.items():
        lowest = [specifier.version for specifier in ranges[name][0].specifier if specifier.operator == ">="]
        assert [[str(requirement.specifier)] for requirement in found] == [[f"=={v}"] for v in lowest * len(found)]


def test_the_newest_set_has_lower_bounds_only_except_for_torch():
    ranges, newest = parsed("ranges"), parsed("newest")
    assert newest.keys() == ranges.keys()
    assert newest.pop("torch") == ranges["torch"]
    for name, found in newest.items():
        assert all([s.operator for s in requirement.specifier] == [">="] for requirement in found), name
    assert {"serving"} in [requirement.extras for requirement in newest["transformers"]]


def test_the_tested_set_is_the_ranges_with_the_constraints():
    *asked, option, path = libraries.pip_arguments("tested", PROJECT)
    assert (asked, option) == (libraries.pip_arguments("ranges", PROJECT), "--constraint")
    assert Path(path).is_file()


def test_torch_stays_below_the_releases_without_a_cpu_build_on_the_package_index():
    assert "2.14.0" not in parsed("newest")["torch"][0].specifier


# constraints.txt


def test_the_tested_versions_lie_within_the_ranges():
    for name, found in parsed("ranges").items():
        assert all(PINS[name] in requirement.specifier for requirement in found), name


@pytest.mark.parametrize("name", INTERFACES)
def test_the_upper_bound_is_the_minor_release_after_the_tested_one(name):
    major, minor = Version(PINS[name]).release[:2]
    upper = [s.version for s in parsed("ranges")[name][0].specifier if s.operator == "<"]
    assert upper == [f"{major}.{minor + 1}"]


def test_everything_that_the_tested_versions_depend_on_has_a_tested_version():
    todo, seen = [(requirement, "") for found in parsed("ranges").values() for requirement in found], set()
    while todo:
        requirement, asked_by = todo.pop()
        name = canonicalize_name(requirement.name)
        if constraints.LEFT_OUT.fullmatch(name) or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        assert name in PINS or "python_version" in str(requirement.marker), f"{name}, which {asked_by} asks for"
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(found.version.partition("+")[0]) != Version(PINS.get(name, "0")):
            continue  # another version has other dependencies
        for line in found.requires or ():
            other = Requirement(line)
            if other.marker is None or any(
                other.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
            ):
                todo.append((other, name))


def test_constraints_name_no_build_no_installer_and_nothing_of_cuda():
    installed = {
        "torch": "2.13.0+cpu",
        "pip": "26.0",
        "modeling-nanochat": "0.1.0",
        "numpy": "2.4.6",
        "triton": "3.6.0",
    }
    written = constraints.constraints(installed | {"nvidia-cublas": "13.1", "cuda-toolkit": "13.0"})
    assert written.splitlines()[1:] == ["numpy==2.4.6", "torch==2.13.0"]
    assert (ROOT / "constraints.txt").read_text() == constraints.constraints(PINS)


def test_a_space_installs_the_tested_versions():
    written = (ROOT / "space" / "requirements.txt").read_text()
    assert written == constraints.space_requirements(PROJECT, PINS)
    pins = dict(line.split("==") for line in written.splitlines() if "==" in line)
    assert pins == {name: PINS[name] for name in {libraries.name_of(line) for line in PROJECT["dependencies"]}}
    front = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert front["sdk_version"] == PINS["gradio"]


def test_pre_commit_runs_the_tested_ruff():
    (ruff,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert ruff["rev"] == f"v{PINS['ruff']}"


def test_a_new_version_replaces_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: 1\n    rev: v0.17.6  # written\nrev: v0.17.6\n")
    constraints.set_version(path, "    rev: v", "0.18.10")
    assert path.read_text() == "a: 1\n    rev: v0.18.10  # written\nrev: v0.17.6\n"


# Installing


def test_pips_output_is_in_the_log_and_the_terminal_has_two_lines(tmp_path, capfd):
    venv = pip_that(tmp_path, "echo 'WARNING: Location is ignored'; echo 'WARNING: Running pip as root' >&2")
    install.install(venv, "tested")
    out, err = capfd.readouterr()
    assert re.fullmatch(r"installing [^\n]*install\.log\) …\ninstalled in \d+ seconds\n", out) and not err
    assert (venv / "install.log").read_text().count("WARNING") == 4
    first, second, third = (tmp_path / "arguments").read_text().splitlines()
    assert f"--constraint {ROOT / 'constraints.txt'}" in first and "transformers[serving]" in first
    assert second.endswith(f"--no-deps --editable {ROOT}")
    assert third.startswith("-c import recipes.ladder.preflight,")


def test_what_is_imported_is_compiled_once_also_where_python_is_told_not_to(monkeypatch):
    for module in install.IMPORTED:
        assert importlib.util.find_spec(module), module
    seen = {}
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(install.subprocess, "run", lambda command, **options: seen.update(options))
    install.compile_what_is_imported(ROOT / ".venv")
    assert "PYTHONDONTWRITEBYTECODE" not in seen["env"] and seen["env"]["PATH"]


@pytest.mark.parametrize(
    ("libraries_set", "output", "advice"),
    [
        (
            "tested",
            "ERROR: No matching distribution found for torch==2.13.0",
            "make PYTHON=.* or .*make LIBRARIES=ranges",
        ),
        ("oldest", "ERROR: ResolutionImpossible", "the oldest libraries cannot be installed with Python"),
        ("tested", "WARNING: Retrying (Retry(total=0)\nERROR: from versions: none", "check the network"),
        ("tested", "ERROR: [Errno 28] No space left on device", "the disk is full"),
    ],
)
def test_a_failing_pip_ends_with_its_errors_and_what_to_do(tmp_path, libraries_set, output, advice):
    noise = "WARNING: Location is ignored"
    (tmp_path / "output").write_text(f"{noise}\n{output}\n{noise}\n")
    venv = pip_that(tmp_path, f"cat {tmp_path}/output; exit 1")
    with pytest.raises(SystemExit, match=advice) as ended:
        install.install(venv, libraries_set)
    *errors, last = ended.value.code.splitlines()
    assert errors == [line for line in output.splitlines() if line.startswith("ERROR")]
    assert str(venv / "install.log") in last


@pytest.mark.slow
def test_an_environment_that_an_interrupted_installation_left_is_made_again(tmp_path, monkeypatch, capsys):
    venv = tmp_path / "venv"
    (venv / "lib").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    (venv / "lib" / "half written").touch()
    assert not install.works(venv)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="interrupted"):
        patched.setattr(install, "install", interrupted)
        install.main(venv, "tested")
    assert install.works(venv) and not list(venv.glob("lib/half*")) and not list(venv.glob(".installed-*"))

    (venv / "lib" / "half installed").touch()
    made = []
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: made.append(command) or made_by_hand(venv))
    monkeypatch.setattr(install, "install", lambda *_: None)
    install.main(venv, "tested")
    assert [command[1:3] for command in made] == [["-m", "venv"]] and not list(venv.glob("lib/half*"))
    assert (venv / ".installed-tested").is_file() and not (venv / ".installing").exists()


def made_by_hand(venv: Path) -> subprocess.CompletedProcess:
    (venv / "pyvenv.cfg").touch()
    return subprocess.CompletedProcess([], 0, "", "")


def test_another_set_in_the_same_environment_replaces_the_first(tmp_path, monkeypatch):
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / ".installed-tested").touch()
    monkeypatch.setattr(install, "works", lambda venv: True)
    monkeypatch.setattr(install, "install", lambda *_: None)
    install.main(tmp_path, "oldest")
    assert [path.name for path in tmp_path.glob(".inst*")] == [".installed-oldest"]


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="not a virtual environment"):
        install.main(tmp_path, "tested")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_python_without_its_venv_module_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    with pytest.raises(SystemExit, match="apt install python3-venv") as ended:
        install.main(tmp_path / "venv", "tested")
    assert "\n" not in ended.value.code and not (tmp_path / "venv").exists()


def test_an_unknown_set_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="LIBRARIES=newset: take one of tested, ranges, oldest, newest"):
        install.main(tmp_path / "venv", "newset")


# The Makefile and the workflows


def make(*arguments: str) -> subprocess.CompletedProcess:
    # of the `make test` that runs this
    outer = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "LIBRARIES", "VENV", "PYTHON"}
    env = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@needs_make
@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml"])
def test_make_installs_again_when_the_versions_change(tmp_path, changed):
    (tmp_path / ".installed-tested").touch()
    assert "install.py" not in make("--dry-run", "run", f"VENV={tmp_path}").stdout
    assert "install.py" in make("--dry-run", "run", f"VENV={tmp_path}", f"--assume-new={changed}").stdout


@needs_make
@pytest.mark.parametrize(
    ("libraries_set", "venv"), [("tested", ".venv"), ("oldest", ".venv-oldest"), ("newest", ".venv-newest")]
)
def test_each_set_has_an_environment_of_its_own(libraries_set, venv):
    planned = make("--dry-run", "--always-make", "test", f"LIBRARIES={libraries_set}").stdout
    assert f".ci/install.py {venv} {libraries_set}\n" in planned
    for command in ("ruff check .", "ruff format --check .", "python -m pytest -n 2 --dist loadfile"):
        assert f"{venv}/bin/{command}\n" in planned
    assert (f"{venv}/bin/mypy\n" in planned) == (libraries_set == "tested")


@needs_make
def test_an_old_python_or_none_is_one_line(tmp_path):
    old = tmp_path / "python3"
    pretend = "import sys; sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    for python, told in (
        (old, "Python 3.11 or newer is needed, this is 3.10.4"),
        (tmp_path / "none", "no such program"),
    ):
        ended = make("install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        lines = [line for line in (ended.stdout + ended.stderr).splitlines() if not line.startswith("make")]
        assert ended.returncode and len(lines) == 1 and told in lines[0]
        assert not (tmp_path / "venv").exists()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@needs_make
@pytest.mark.parametrize("words", [(), ("help",)])
def test_make_alone_and_make_help_document_every_target(words):
    said = make(*words).stdout
    documented = dict(re.findall(r"^make ([a-z-]+) +(\S.*)$", said, re.MULTILINE))
    assert documented.keys() == targets() and len(targets()) >= 10
    assert "LIBRARIES=tested" in said


@needs_make
def test_the_commands_to_type_next_have_the_settings_that_make_was_called_with(tmp_path):
    (tmp_path / ".installed-tested").touch()
    planned = make("--dry-run", "run", f"VENV={tmp_path}", "RUN=runs/mine").stdout
    (command,) = re.findall(r'--next "(.*)"', planned)
    for target, program in (("chat", "nanochat-chat"), ("space", "space/app.py")):
        words = re.search(rf"make ([^()]*?) {target}\b", command)[1].split()[-2:]
        assert sorted(words) == ["RUN=runs/mine", f"VENV={tmp_path}"]
        assert f"{program} runs/mine/rl" in make("--dry-run", target, *words).stdout


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_runs_what_exists(name):
    run = commands(WORKFLOWS[name])
    assert run
    for command in run:
        program, *words = command.split()
        if program == "make":
            plain = [word for word in words if not word.startswith("-") and "=" not in word]
            assert plain and set(plain) <= targets(), command
            assert all(word[10:] in libraries.SETS for word in words if word.startswith("LIBRARIES=")), command
        else:
            assert program in ("bash", "python", ".venv/bin/python") and (ROOT / words[0]).is_file(), command


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_uses_no_actions_of_third_parties_and_the_cpu_builds(name):
    jobs = WORKFLOWS[name]["jobs"].values()
    assert all(step["uses"].startswith("actions/") for job in jobs for step in job["steps"] if "uses" in step)
    assert all(job["env"]["PIP_EXTRA_INDEX_URL"] == "https://download.pytorch.org/whl/cpu" for job in jobs)


def test_the_oldest_and_newest_sets_are_tested_every_week_and_on_demand():
    for name in ("oldest", "newest"):
        triggers = WORKFLOWS[name][True]  # YAML 1.1 reads the key `on` as true
        assert set(triggers) == {"schedule", "workflow_dispatch"}
        test, report = commands(WORKFLOWS[name])
        assert f"LIBRARIES={name}" in test and f".venv-{name} report.xml" in report
        job = WORKFLOWS[name]["jobs"]["test"]
        assert job["steps"][-1]["if"] == "always()" and job["env"]["PYTEST_ADDOPTS"] == "--junitxml=report.xml"


def test_the_supported_python_is_among_the_tested_ones():
    tested = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f">={min(tested, key=Version)}" == PROJECT["requires-python"]
    assert "3.12" in tested  # which the messages and the Space name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "recipes/pocket/README.md", ".ci/run"])
def test_the_words_name_existing_make_targets(name):
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE)
    assert named and set(named) <= targets()


# What the newest libraries broke


def test_the_report_opens_with_the_versions_that_differ():
    tested = {"torch": "2.13.0", "transformers": "5.24.0", "numpy": "2.4.6", "idna": "3.20"}
    installed = {"torch": "2.13.0+cpu", "transformers": "5.25.0", "numpy": "2.4.6", "idna": "4.0", "other": "1"}
    assert what_broke.versions(tested, installed, ["torch", "transformers"]) == [
        "| library | tested | here |",
        "| --- | --- | --- |",
        "| **transformers** | 5.24.0 | 5.25.0 |",
        "| idna | 3.20 | 4.0 |",
    ]
    assert what_broke.versions(tested, {"torch": "2.13.0+cpu"}, []) == ["All libraries have the tested versions."]


def test_the_report_groups_failing_tests_by_their_error():
    report = ElementTree.fromstring(
        """<testsuites><testsuite>
        <testcase classname="a" name="one"><failure message="TypeError: no cache&#10;at 0x1f"/></testcase>
        <testcase classname="a" name="two"/>
        <testcase classname="b" name="three"><failure message="OSError: /tmp/x1: 7 of 9"/></testcase>
        <testcase classname="b" name="four"><error message="OSError: /tmp/x2: 8 of 9"/></testcase>
        </testsuite></testsuites>"""
    )
    lines = what_broke.failures(report)
    assert lines[0] == "3 of 4 tests failed."
    assert (
        lines.index("**2 ×** `OSError: … … of …`")
        < lines.index("- b.four")
        < lines.index("**1 ×** `TypeError: no cache`")
    )


def test_the_report_tells_why_no_test_ran(tmp_path, capsys):
    (tmp_path / "install.log").write_text("ERROR: ResolutionImpossible\n")
    what_broke.main(tmp_path, tmp_path / "report.xml")
    told = capsys.readouterr().out
    assert "The tests did not run." in told and "ResolutionImpossible" in told
