"""A command run in a fork of this process, or anew: what it finds, and how it ends."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch  # a fork is worth it only for its imports

from modeling_nanochat.chat.python_tool import check_sandbox, sandbox_has_started
from modeling_nanochat.errors import UserError
from recipes.ladder import process
from recipes.ladder.process import call, can_fork, check_in_fork, split_variables

ENDING = {"forked": [], "anew": ["-X", "utf8"]}  # with an option of Python's it is no bare script
TELLING = """
import atexit, json, os, signal, sys
atexit.register(print, "at exit", flush=True)
found = {
    "argv": sys.argv, "name": __name__, "told": os.environ["TOLD"], "pid": os.getpid(), "group": os.getpgid(0),
    "launcher": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
    "torch": "torch" in sys.modules,
    "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
    "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "default": [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGHUP)],
}
json.dump(found, open(sys.argv[1], "w"))
print("said"); print("complained", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    monkeypatch.setattr(process, "sandbox_has_started", lambda: False)  # of other tests
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_script(folder, text):
    script = folder / "script.py"
    script.write_text(text)
    return str(script)


@pytest.mark.parametrize("how", ENDING)
def test_a_script_finds_the_same_forked_or_anew(tmp_path, capfd, how):
    command = [
        "env",
        "OMP_NUM_THREADS=1",
        sys.executable,
        *ENDING[how],
        write_script(tmp_path, TELLING),
        str(tmp_path / "found"),
    ]
    assert call(command, {"TOLD": "this"}) == 3
    found = json.loads((tmp_path / "found").read_text())
    how = how if can_fork() else "anew"
    assert found["launcher"] == (None if how == "forked" else "300")
    assert found["torch"] == (how == "forked") and found["threads"] == (1 if how == "forked" else None)
    assert found["argv"][0].endswith("script.py") and found["argv"][1:] == [str(tmp_path / "found")]
    assert (found["name"], found["told"], found["int"], found["default"]) == ("__main__", "this", True, [True, True])
    assert found["group"] == found["pid"] != os.getpid()
    out, err = capfd.readouterr()
    assert out == "said\nat exit\n" and err == "complained\n"
    assert "TOLD" not in os.environ and sys.argv[0] != found["argv"][0]


@pytest.mark.parametrize("how", ENDING)
def test_of_a_silent_one_only_errors_are_seen(tmp_path, capfd, how):
    script = write_script(tmp_path, "import sys; print('a table'); print('a warning', file=sys.stderr)")
    assert call([sys.executable, *ENDING[how], script], {}, silent=True) == 0
    assert capfd.readouterr() == ("", "a warning\n")


def test_a_traceback_ends_with_exit_code_1_and_a_signal_with_its_number(tmp_path, capfd):
    assert call([sys.executable, write_script(tmp_path, "1 / 0")], {}) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err
    script = write_script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert call([sys.executable, script], {}) == -signal.SIGKILL


STOPPED = """
import pathlib, signal, subprocess, sys, time
def write(number, frame):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text(str(number))
    sys.exit(1)
signal.signal(signal.SIGTERM, write)
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(sys.argv[1] + ".ready").write_text(str(child.pid))
child.wait()
"""


@pytest.mark.parametrize("how", ENDING)
def test_a_stopped_one_may_write_and_takes_its_children_along(tmp_path, how):
    def interrupt():
        while not ready.exists() or not ready.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    written, ready = tmp_path / "written", tmp_path / "written.ready"
    threading.Thread(target=interrupt).start()
    with pytest.raises(UserError, match="^stopped; this continues from here$"):
        call([sys.executable, *ENDING[how], write_script(tmp_path, STOPPED), str(written)], {}, again="this")
    assert written.read_text() == str(int(signal.SIGTERM))
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


def test_a_fork_does_not_do_what_its_parent_is_to_do_at_its_end(tmp_path):
    def leave_word():
        (tmp_path / "word").write_text(str(os.getpid()))

    atexit.register(leave_word)
    try:
        check_in_fork(lambda: None)
        assert not (tmp_path / "word").exists()
    finally:
        atexit.unregister(leave_word)


def test_a_check_in_a_fork_leaves_only_its_refusal():
    def refuse():
        os.environ["LEFT"] = "yes"
        raise UserError("depth: is 0, must be at least 1")

    with pytest.raises(UserError, match="^depth: is 0, must be at least 1$"):
        check_in_fork(refuse)
    assert "LEFT" not in os.environ
    check_in_fork(lambda: None)
    with pytest.raises(SystemExit):
        check_in_fork(lambda: 1 / 0)


def test_beside_an_accelerator_nothing_is_forked(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not can_fork()


def test_a_process_with_a_sandbox_is_not_forked(monkeypatch):
    monkeypatch.setattr(process, "sandbox_has_started", sandbox_has_started)
    check_sandbox()
    assert sandbox_has_started() and not can_fork()


def test_variables_before_a_command():
    assert split_variables(["env", "A=1", "B=x=y", "python", "a.py", "C=2"]) == (
        {"A": "1", "B": "x=y"},
        ["python", "a.py", "C=2"],
    )
    assert split_variables(["accelerate", "launch"]) == ({}, ["accelerate", "launch"])


def test_without_torch_nothing_is_forked():
    code = "import sys; from recipes.ladder.process import can_fork; sys.exit(can_fork() or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_run_imports_no_library_that_reads_the_stages_variables_before_it_sets_them():
    libraries = {"datasets", "huggingface_hub", "torch", "tqdm", "transformers"}
    code = f"import sys, recipes.run; sys.exit(', '.join({libraries} & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
