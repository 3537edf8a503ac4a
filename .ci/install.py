"""Install the project and one set of its libraries (libraries.py) into a virtual environment.

python .ci/install.py .venv tested

pip's output goes to install.log in the environment; the terminal shows one line, or pip's errors and what to do.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from libraries import ROOT, SETS, pip_arguments, read_project

IMPORTED = ("recipes.ladder.preflight", "evals.report", "tokenizer_train.evaluate", "gradio", "pytest")
UNREACHABLE = ("Retrying (Retry", "ConnectionError", "NewConnectionError", "ReadTimeout", "Temporary failure in name")


def main(venv: Path, libraries: str) -> None:
    if libraries not in SETS:
        sys.exit(f"LIBRARIES={libraries}: take one of {', '.join(SETS)}")
    unfinished = venv / ".installing"
    try:
        make_environment(venv, unfinished)
        install(venv, libraries)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command starts the installation again")
    for other in venv.glob(".installed-*"):
        other.unlink()
    unfinished.unlink()
    (venv / f".installed-{libraries}").touch()


def make_environment(venv: Path, unfinished: Path) -> None:
    """Create the environment, or recreate it after an interrupted installation, because pip treats half-written
    packages as installed.

    Raises:
        SystemExit: The folder is not an environment, or this Python cannot create one.
    """
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        sys.exit(f"{venv} is not a virtual environment; move it away, or name another folder: make VENV=…")
    if unfinished.exists() or not works(venv):
        if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
            sys.exit(
                f"{sys.executable} cannot make virtual environments; install its venv module (on Debian and Ubuntu: "
                "apt install python3-venv), or name another Python: make PYTHON=…"
            )
        empty(venv)
        made = subprocess.run([sys.executable, "-m", "venv", venv], check=False, capture_output=True, text=True)
        if made.returncode:
            reason = (made.stderr or made.stdout).strip().splitlines()
            last = reason[-1] if reason else "no reason given"
            sys.exit(f"{sys.executable} cannot make the virtual environment {venv}: {last}")
    unfinished.touch()


def empty(venv: Path) -> None:
    """Delete the environment's contents; pyvenv.cfg, which identifies it, goes last in case of an interruption."""
    for entry in sorted(venv.iterdir() if venv.exists() else (), key=lambda entry: entry.name == "pyvenv.cfg"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def works(venv: Path) -> bool:
    """Whether the environment has a recent enough Python and a working pip."""
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        ended = subprocess.run([venv / "bin" / "python", "-c", check], check=False, capture_output=True)
    except OSError:
        return False
    return ended.returncode == 0


def install(venv: Path, libraries: str) -> None:
    """Install the libraries, then the checkout itself without its dependencies, whose ranges `newest` exceeds.

    Raises:
        SystemExit: pip failed; the message has its errors and what to do.
    """
    log, start = venv / "install.log", time.monotonic()
    print(f"installing the libraries into {venv}, a few minutes the first time (log: {log}) …", flush=True)
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"]
    steps = [upgrade + pip_arguments(libraries, read_project()), ["--no-deps", "--editable", str(ROOT)]]
    with open(log, "w", encoding="utf-8") as output:
        for step in steps:
            pip = [venv / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            command = [*pip, "--progress-bar", "off", "--no-compile", *step]  # most files are never imported
            ended = subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT)
            if ended.returncode:
                sys.exit(explain(log.read_text(encoding="utf-8", errors="replace"), libraries, log))
    compile_what_is_imported(venv)
    print(f"installed in {time.monotonic() - start:.0f} seconds")


def compile_what_is_imported(venv: Path) -> None:
    """Import all modules once to write their bytecode. Without it, commands start less than half as fast where
    PYTHONDONTWRITEBYTECODE is set, as in many containers. Failing imports are ignored here; the tests report them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [(venv / "bin" / "python").absolute(), "-c", f"import {', '.join(IMPORTED)}"]
    subprocess.run(command, check=False, capture_output=True, cwd=ROOT, env=environment)


def explain(output: str, libraries: str, log: Path) -> str:
    """The last errors in pip's output, and a line on what to do."""
    errors = [line for line in output.splitlines() if line.lower().startswith("error")]
    if "No space left on device" in output:
        advice = "the disk is full; the libraries need 2 GB, with torch's CUDA build 8 GB"
    elif any(words in output for words in UNREACHABLE):
        advice = "the package index cannot be reached; check the network or PIP_INDEX_URL, then repeat the command"
    elif libraries == "tested":
        advice = (
            f"the versions in constraints.txt cannot be installed with Python {platform.python_version()}; "
            "use another Python (make PYTHON=python3.12), or the newest versions that pyproject.toml allows "
            "(make LIBRARIES=ranges)"
        )
    else:
        advice = f"the {libraries} libraries cannot be installed with Python {platform.python_version()}"
    return "\n".join([*errors[-5:], f"{advice}. pip's full output: {log}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
