import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from evals import full_python
from evals.full_python import MAX_OUTPUT_BYTES, check_full_python, run_program
from modeling_nanochat.errors import UserError

HUMAN_EVAL = '''
from typing import List


def below_threshold(numbers: List[int], limit: int) -> bool:
    """Whether all numbers are below the limit."""
    return all(number < limit for number in numbers)


def check(candidate):
    assert candidate([1, 2, 4, 10], 100)
    assert not candidate([1, 20, 4, 10], 5)


check(below_threshold)
'''


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        check_full_python()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def nothing_left_over(tmp_path, monkeypatch):
    """No process, descriptor or directory outlives a program."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    descriptors = psutil.Process().num_fds()
    yield
    left = [process for process in psutil.process_iter(["cmdline"]) if is_ours(process)]
    assert not psutil.wait_procs(left, timeout=5)[1]
    assert psutil.Process().num_fds() == descriptors
    assert not list(tmp_path.iterdir())


def is_ours(process: psutil.Process) -> bool:
    words = process.info["cmdline"] or []
    return words[-1:] == ["program.py"] or any(word.endswith("evals/jail.py") for word in words)


@pytest.mark.parametrize(
    "source",
    [
        HUMAN_EVAL,
        "import collections, functools, hashlib, heapq, itertools, math, random, re, string, typing",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
        "open('notes', 'w').write('x')\nassert open('notes').read() == 'x'",
        "print('é')\nassert 'é' == '\\xe9'",
    ],
)
def test_an_ordinary_program_succeeds(source):
    result = run_program(source, timeout=30)
    assert result.succeeded, result


@pytest.mark.parametrize(
    ("source", "code"), [("assert 1 == 2", 1), ("1 +", 1), ("raise SystemExit(3)", 3), ("x = bytearray(10**10)", 1)]
)
def test_a_wrong_program_ends_with_its_code(source, code):
    result = run_program(source, timeout=30)
    assert (result.ended, result.code) == ("exit", code) and not result.succeeded


def test_a_crash_is_a_signal():
    result = run_program("import ctypes\nctypes.string_at(0)", timeout=30)
    assert result.ended == "signal" and result.code < 0 and not result.succeeded


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True:\n"
    "    try: threading.Thread(target=time.sleep, args=(1000,)).start()\n    except RuntimeError: pass",
    "10 GB of output": "import sys\nwhile True: sys.stdout.write('x' * 10**5)",
    "10 GB of errors": "import sys\nwhile True: sys.stderr.write('x' * 10**5)",
    "closed pipes": "import os, time\nfor number in range(64):\n    try: os.close(number)\n    except OSError: pass\n"
    "time.sleep(1000)",
    "signals ignored": "import signal\nfor number in set(signal.Signals) - {9, 19}:\n"
    "    signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
    "new session": "import os\nos.fork() or os.setsid()\nwhile True: pass",
    "stopped": "import os, signal\nos.fork()\nos.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_what_never_ends_is_stopped_within_a_second_of_its_limit(source):
    started = time.monotonic()
    result = run_program(source, timeout=1.5)
    assert time.monotonic() - started < 2.5
    assert result.ended == "timeout" and not result.succeeded
    assert len(result.stdout) <= MAX_OUTPUT_BYTES and len(result.stderr) <= MAX_OUTPUT_BYTES


REFUSED = {
    "accounts": "open('/etc/passwd')",
    "this repository": f"open({str(Path(__file__))!r})",
    "home": f"import os\nos.listdir({str(Path.home() / '.ssh')!r})",
    "processes": "import os\nos.listdir('/proc')",
    "devices": "import os\nos.listdir('/sys')",
    "disks": "import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))",
    "the system": "open('/usr/lib/new', 'w')",
    "the interpreter": "import os, sys\nopen(os.path.join(sys.base_prefix, 'new'), 'w')",
    "a large file": "with open('large', 'wb') as file:\n    for _ in range(10**4): file.write(bytes(10**6))",
    "many files": "for number in range(10**6): open(str(number), 'wb').write(bytes(10**6))",
    "many small files": "import os\nfor number in range(10**6): os.mknod(str(number))",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "root": "import os\nos.setuid(0)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
    "the host's other sockets": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, None, None) == 0",
    "namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounting": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/private', b'proc', 0, None) == 0",
    "its parent's parent": f"import os\nos.kill({os.getpid()}, 0)",
    "other descriptors": "import os\nfor number in range(3, 64): os.close(os.dup(number))",
    "leaving by ..": "import os\nos.chdir('../../../../..')\nassert os.path.exists('etc/passwd')",
    "leaving by chroot": "import os\nos.mkdir('x')\nos.chroot('x')",
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED.keys())
def test_nothing_outside_can_be_reached_and_nothing_grows_without_bound(source):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        result = run_program(source.replace("PORT", str(server.getsockname()[1])), timeout=30)
        with pytest.raises(TimeoutError):
            server.accept()
    assert result.ended == "exit" and result.code == 1, result


def test_the_environment_is_empty_and_so_is_the_input(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    result = run_program("import os, sys\nprint(set(os.environ) - {'LC_CTYPE'}, sys.stdin.read() == '', os.listdir())")
    assert result.stdout == "set() True ['program.py']\n", result


def test_its_parents_cannot_be_killed():
    result = run_program(
        "import os\nfor number in (1, os.getppid()): os.kill(number, 9)\nprint('still here')", timeout=30
    )
    assert result.stdout == "still here\n" and result.succeeded


def test_a_daemon_ends_with_its_program():
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork() or time.sleep(1000)\n    time.sleep(1000)"
    )
    started = time.monotonic()
    assert run_program(daemon, timeout=30).succeeded
    assert time.monotonic() - started < 10


def test_a_caller_that_dies_takes_the_program_with_it_at_its_limit(tmp_path):
    caller = "from evals.full_python import run_program\nrun_program('import time\\ntime.sleep(1000)', timeout=1)"
    process = subprocess.Popen([sys.executable, "-c", caller])
    deadline = time.monotonic() + 60
    while not psutil.Process(process.pid).children(recursive=True):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()  # what is left must end within the fixture's five seconds
    (folder,) = tmp_path.iterdir()
    folder.rmdir()  # empty: what was in it was never on the disk


as_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")


@as_root
def test_an_ordinary_user_can_run_programs():
    """Root's tests above bind without a user namespace; this one needs a Python that another user can read."""
    root, python = str(Path(full_python.__file__).parents[1]), "/usr/bin/python3"
    become = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    importable = [*become, python, "-B", "-c", "import sys, evals.full_python\nassert sys.version_info >= (3, 11)"]
    environment = {"PYTHONPATH": root, "TMPDIR": "/tmp"}
    if (
        not Path(python).exists()
        or subprocess.run(importable, check=False, env=environment, capture_output=True).returncode
    ):
        pytest.skip(f"another user cannot import this repository with {python} >= 3.11")
    caller = (
        "from evals.full_python import check_full_python, run_program\ncheck_full_python()\n"
        f"for source in {[*REFUSED.values()]}: print(run_program(source.replace('PORT', '9'), timeout=30).code)"
    )
    command = [*become, python, "-B", "-c", caller]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert result.stdout == "1\n" * len(REFUSED), result


@as_root
def test_where_the_kernel_forbids_namespaces_nothing_runs():
    caller = "from evals.full_python import run_program\nprint(run_program('print(1)'))"
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", caller]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "UserError: programs cannot be isolated here (Operation not permitted: unshare): allow" in result.stderr
    assert result.stdout == ""


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(full_python.sys, "platform", "darwin")
    with pytest.raises(UserError, match="Linux"):
        run_program("print(1)")
