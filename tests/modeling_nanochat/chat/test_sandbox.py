"""The sandbox's processes: forks, threads, crashes, and what is left of them."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from modeling_nanochat.chat import python_tool
from modeling_nanochat.chat.python_tool import check_sandbox, run_python, sandbox_pool

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture(autouse=True)
def started():
    check_sandbox()


def sandbox_process() -> psutil.Process:
    return psutil.Process(sandbox_pool(os.getpid()).sandbox.process.pid)


def counts():
    """Processes, threads and descriptors, of this process and of the sandbox's."""
    here, sandbox = psutil.Process(), sandbox_process()
    return (
        len(here.children(recursive=True)),
        here.num_threads(),
        here.num_fds(),
        sandbox.num_threads(),
        sandbox.num_fds(),
    )


def assert_no_more_than(before):
    gc.collect()
    assert all(now <= then for now, then in zip(counts(), before, strict=True)), (counts(), before)


def in_fork(function, seconds=60.0):
    """What `function` returns in a fork of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    killer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with open(reader) as file:
        text = file.read()
    killer.cancel()
    os.waitpid(pid, 0)
    return text


def answer(queue):
    queue.put(run_python("6 * 7"))


@posix
def test_a_fork_of_a_process_that_used_the_tool_can_use_it():
    assert run_python("6 * 7") == "42"
    assert in_fork(lambda: run_python("6 * 7")) == "42"
    assert in_fork(lambda: in_fork(lambda: run_python("6 * 7"))) == "42"
    assert run_python("6 * 7") == "42"


@posix
def test_a_multiprocessing_fork_can_use_it():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=answer, args=(queue,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == ["42"] * 3
    for worker in workers:
        worker.join()


@posix
def test_a_fork_during_calls_in_other_threads_can_use_it():
    stop = threading.Event()

    def call():
        while not stop.is_set():
            assert run_python("while True: pass", timeout=0.05).startswith("TimeoutError")
            assert run_python("6 * 7", timeout=10) == "42"

    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(call) for _ in range(4)]
        try:
            for _ in range(5):
                assert in_fork(lambda: run_python("6 * 7", timeout=10)) == "42"
        finally:
            stop.set()
        for each in calls:
            each.result()


@posix
def test_a_fork_does_not_keep_its_parents_sandbox_alive():
    program = (
        "import os, time\nfrom modeling_nanochat.chat.python_tool import run_python, sandbox_pool\nrun_python('1')\n"
        "if os.fork() == 0: time.sleep(1000)\nprint(sandbox_pool(os.getpid()).sandbox.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        sandbox = psutil.Process(int(parent.stdout.readline()))
        parent.wait()
        assert not psutil.wait_procs([sandbox], timeout=10)[1]
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_nothing_outlives_the_caller(end):
    program = (
        "import os\nfrom modeling_nanochat.chat.python_tool import run_python, sandbox_pool\nrun_python('1')\n"
        f"print(sandbox_pool(os.getpid()).sandbox.process.pid, flush=True)\ninput()\n{end}"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as caller:
        sandbox = psutil.Process(int(caller.stdout.readline()))
        family = [sandbox, *sandbox.children(recursive=True)]
        assert len(family) > 1
        caller.communicate(b"\n")
    assert not psutil.wait_procs(family, timeout=10)[1]


FAILING = {
    "time": "while True: pass",
    "killed for time": "x = [1]\nfor _ in range(40): x = [x, x]\nx",
    "memory": "'a' * 10**10",
    "memory while shown": "x = 'a' * 10**7\n[x] * 1000",
    "recursion": "def f(): return f()\nf()",
    "syntax": "(",
}


@pytest.mark.slow
def test_200_calls_that_fail_leave_nothing():
    for code in FAILING.values():
        run_python(code, timeout=0.05)
    before = counts()
    for _ in range(34):
        for code in FAILING.values():
            assert "Error: " in run_python(code, timeout=0.05)
    assert run_python("6 * 7") == "42"
    assert_no_more_than(before)


@posix
def test_a_sandbox_that_is_killed_is_replaced_and_leaves_nothing():
    before = counts()
    for _ in range(5):
        sandbox_process().kill()
        sandbox_process().wait()
        assert run_python("6 * 7") == "42"
    assert_no_more_than(before)


@posix
def test_a_sandbox_that_is_killed_during_a_call_is_one_line():
    threading.Timer(0.3, sandbox_process().kill).start()
    assert run_python("while True: pass", timeout=20) == "RuntimeError: the interpreter crashed"
    assert run_python("6 * 7") == "42"


@posix
def test_a_sandbox_that_hangs_is_replaced(monkeypatch):
    monkeypatch.setattr(python_tool, "REPLY_SECONDS", 0.5)
    sandbox_process().suspend()
    assert run_python("6 * 7", timeout=0.5) == "RuntimeError: the interpreter crashed"
    monkeypatch.undo()
    assert run_python("6 * 7") == "42"


def test_an_interpreter_that_is_killed_is_replaced():
    for interpreter in sandbox_process().children(recursive=True):
        interpreter.kill()
    assert [run_python("6 * 7", timeout=5) for _ in range(3)][-1] == "42"


def test_endless_code_of_others_does_not_hold_up_a_call():
    with ThreadPoolExecutor(32) as threads:
        others = [threads.submit(run_python, "while True: pass", timeout=8.0) for _ in range(32)]
        time.sleep(0.5)
        started = time.monotonic()
        assert run_python("6 * 7", timeout=20) == "42"
        assert time.monotonic() - started < 6 and not any(other.done() for other in others)
        assert {other.result() for other in others} == {"TimeoutError: stopped after 8 s"}
    left = sandbox_process().children(recursive=True)
    assert len(psutil.wait_procs(left, timeout=0.5)[1]) <= os.cpu_count()


def test_more_calls_than_interpreters_are_told_that_the_tool_is_busy(monkeypatch):
    monkeypatch.setattr(sandbox_pool(os.getpid()), "slots", threading.BoundedSemaphore(1))
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(run_python, "while True: pass", timeout=2.0)
        time.sleep(0.2)
        assert run_python("6 * 7", timeout=0.1).startswith("TimeoutError: the tool is busy")
        assert run_python("6 * 7", timeout=10.0) == "42"
        assert other.result() == "TimeoutError: stopped after 2 s"


def test_many_threads_start_together():
    program = (
        "import gc, os, psutil, time\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from modeling_nanochat.chat.python_tool import run_python\n"
        "with ThreadPoolExecutor(16) as threads: print(set(threads.map(run_python, ['6 * 7'] * 16)))\n"
        "gc.collect()\nfor _ in range(100):\n"
        "    sandboxes = [each for each in psutil.Process().children() if each.status() != 'zombie']\n"
        "    if len(sandboxes) == 1: break\n    time.sleep(0.1)\nprint(len(sandboxes))"
    )
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert shown.stdout == "{'42'}\n1\n" and shown.stderr == ""


def test_the_sandbox_does_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    pool = sandbox_pool.__wrapped__(os.getpid())
    assert pool.run("6 * 7", 10.0, 2**26) == "42"
    sandbox = psutil.Process(pool.sandbox.process.pid)
    for process in (sandbox, *sandbox.children(recursive=True)):
        assert "HF_TOKEN" not in process.environ()
