"""What holds for every command: `--help`, Ctrl-C at any moment, an output that is no longer read."""

import os
import runpy
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modeling_nanochat import errors
from modeling_nanochat.errors import UserError, exit_on_user_error, is_imported_by_command, output_is_read

ROOT = Path(__file__).parents[2]
INSTALLED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = ["modeling_nanochat.chat", "modeling_nanochat.convert"]
NO_COMMANDS = {"evals/jail.py"}  # `full_python.py` alone starts it
SCRIPTS = sorted(
    {
        str(path.relative_to(ROOT))
        for folder in ("recipes", "evals", "tokenizer_train", "space")
        for path in (ROOT / folder).rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    - NO_COMMANDS
)
# Whatever a command imports first stands for all libraries: it is there that Ctrl-C comes.
LIBRARIES = [
    "accelerate", "datasets", "evaluate", "gradio", "huggingface_hub", "matplotlib", "numpy", "psutil", "pyarrow",
    "safetensors", "spaces", "tokenizers", "torch", "tqdm", "transformers", "trl", "yaml",
]  # fmt: skip
PRESS_CTRL_C = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"


@pytest.fixture(scope="module")
def interrupted_libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libraries")
    for name in LIBRARIES:
        (folder / f"{name}.py").write_text(PRESS_CTRL_C)
    return folder


def run(command, **options):
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, **options)


def run_interrupted(command, libraries):
    return run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(libraries), str(ROOT)])})


def test_there_are_the_commands_that_the_readme_tells_of():
    assert {"recipes/run.py", "recipes/sft.py", "evals/report.py", "space/app.py", "tokenizer_train/train.py"} <= set(
        SCRIPTS
    )


@pytest.mark.parametrize(
    "words", [[script] for script in SCRIPTS] + [["-m", module] for module in MODULES], ids=" ".join
)
def test_ctrl_c_during_the_imports_ends_a_command_without_a_word(words, interrupted_libraries):
    result = run_interrupted([sys.executable, *words], interrupted_libraries)
    # 130, as a shell calls it, where the libraries are imported only once the command handles Ctrl-C itself
    assert result.returncode in (-signal.SIGINT, 130)
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("name", errors.COMMANDS)
def test_ctrl_c_during_the_imports_ends_an_installed_command_without_a_word(name, tmp_path, interrupted_libraries):
    program = tmp_path / name
    module, function = INSTALLED[name].split(":")
    program.write_text(f"from {module} import {function}\n{function}()\n")  # as pip writes it
    result = run_interrupted([sys.executable, str(program)], interrupted_libraries)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_the_installed_commands_are_those_that_end_on_ctrl_c():
    assert sorted(INSTALLED) == sorted(errors.COMMANDS)


def test_a_library_user_keeps_keyboard_interrupts(interrupted_libraries, tmp_path):
    """In a notebook, a test or a script of one's own, Ctrl-C during the import is the exception it always was."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "try:\n    from modeling_nanochat import NanoChatConfig\nexcept KeyboardInterrupt:\n    print('caught')\n"
    )
    for command in ([str(mine)], ["-m", "mine"], ["-c", mine.read_text()]):
        path = os.pathsep.join([str(interrupted_libraries), str(ROOT), str(tmp_path)])
        result = run([sys.executable, *command], env=os.environ | {"PYTHONPATH": path})
        assert (result.returncode, result.stdout) == (0, "caught\n"), result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("argv0", "orig_argv", "command"),
    [
        ("-m", ["python", "-m", "modeling_nanochat.chat", "x"], True),
        ("-m", ["python", "-I", "-m", "modeling_nanochat.convert"], True),
        ("-m", ["python", "-m", "another.package"], False),
        ("/usr/bin/nanochat-chat", ["python", "/usr/bin/nanochat-chat"], True),
        ("C:\\nanochat-convert.exe", ["python"], os.name == "nt"),
        ("train.py", ["python", "train.py", "-m", "modeling_nanochat"], False),
        ("", ["python"], False),
    ],
)
def test_only_its_own_commands_count_as_such(argv0, orig_argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert is_imported_by_command("modeling_nanochat") == command


@pytest.fixture
def sigint_as_before():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_every_command_has_help_with_its_options(script, capsys, monkeypatch, sigint_as_before):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    run_as_main = (
        runpy.run_module if script in MODULES else lambda name, **how: runpy.run_path(str(ROOT / name), **how)
    )
    monkeypatch.delitem(sys.modules, f"{script}.__main__", raising=False)  # runpy warns of one that is there already
    with pytest.raises(SystemExit) as end:
        run_as_main(script, run_name="__main__")
    out = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert "usage: " in out and out.count("\n  --") > 1


# Commands in miniature: the module alone, without the package, whose imports take seconds.
BEGIN = f"""
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("errors", {errors.__file__!r})
errors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(errors)
"""


def start_command(main, before="", **options):
    code = f"{BEGIN}{before}\ndef main():\n    {main}\nerrors.exit_on_user_error(main)\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGINT, signal.SIG_DFL)"])
def test_ctrl_c_in_a_command_is_exit_code_130_without_a_word(before):
    process = start_command("print('ready', flush=True); time.sleep(20)", before)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "")


def test_ctrl_c_while_a_command_winds_up_is_no_traceback():
    winding_up = "import atexit; atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(20)))"
    process = start_command("pass", f"signal.signal(signal.SIGINT, signal.SIG_DFL); {winding_up}")
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == -signal.SIGINT


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c():
    process = start_command(
        "os.kill(os.getpid(), signal.SIGINT); print('done')", "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    )
    assert process.communicate(timeout=10) == ("done\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("print('x' * 100_000)", 141),
        ("[print('x', flush=True) for _ in range(3)]", 141),
        ("print('only in the buffer')", 0),
        ("print('x'); sys.exit(3)", 3),
    ],
)
def test_an_output_that_nobody_reads_is_no_traceback(main, code, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    process = start_command(main, stdout=writer, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == (141 if unbuffered else code)


def test_another_broken_pipe_is_not_taken_for_the_output():
    process = start_command("raise BrokenPipeError('a worker died')")
    assert "BrokenPipeError: a worker died" in process.communicate(timeout=10)[1]


def test_a_closed_output_is_no_error():
    process = start_command("print('unseen')", "sys.stdout = None")
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 0


def test_a_user_error_is_one_line_and_exit_code_1(capsys):
    def fail():
        raise UserError("no such folder")

    with pytest.raises(SystemExit) as end:
        exit_on_user_error(fail)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: no such folder\n"
    assert output_is_read()
