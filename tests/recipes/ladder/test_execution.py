"""The lock of a run folder."""

import errno
import fcntl
import os
import signal
import sys
import time

import pytest
import torch  # noqa: F401  a step is forked only where torch is loaded

from modeling_nanochat.errors import UserError
from recipes.ladder import process
from recipes.ladder.execution import only_run
from recipes.ladder.process import call

ENDING = {"forked": [], "anew": ["-X", "utf8"]}  # with an option of Python's it is no bare script


@pytest.mark.parametrize("how", ENDING)
def test_a_step_holds_the_folder_after_its_run_was_killed(tmp_path, monkeypatch, how):
    monkeypatch.setattr(process, "sandbox_has_started", lambda: False)  # of other tests
    (tmp_path / "step.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name('writing').write_text(str(os.getpid()))\n"
        "pathlib.Path(__file__).with_name('writing').rename(pathlib.Path(__file__).with_name('pid'))\n"
        "time.sleep(60)\n"
    )
    run = os.fork()
    if run == 0:
        with only_run(tmp_path / "run") as lock:
            call([sys.executable, *ENDING[how], str(tmp_path / "step.py")], {}, lock=lock)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    with pytest.raises(UserError, match="in use by another run"), only_run(tmp_path / "run"):
        pass
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    while is_held(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_held(run_dir):
    try:
        with only_run(run_dir):
            return False
    except UserError:
        return True


def test_where_the_file_system_has_no_locks_nothing_is_locked(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run(tmp_path / "run"), only_run(tmp_path / "run"):
        pass
