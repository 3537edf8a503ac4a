"""Model-written code that attacks the tool: nothing gets through, and the caller lives on."""

import os
import re
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from tool_attacks import BASES, MUTATIONS, attacks

from modeling_nanochat.chat.python_tool import MAX_OUTPUT_CHARACTERS, run_python, sandbox_pool

TIMEOUT = 0.2
SLACK = 10.0  # seconds, for a machine that does other things; the interpreter is stopped half a second after its limit


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What the attacks are after: a file, a variable, a folder to write to, a port."""
    (tmp_path / "secret").write_text("the-host's-secret")
    (tmp_path / "canary").mkdir()
    monkeypatch.setenv("TOOL_SECRET", "the-host's-secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield tmp_path, server
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (tmp_path / "secret").read_text() == "the-host's-secret"
    assert list((tmp_path / "canary").iterdir()) == []


@contextmanager
def memory_bounded(most):
    """Fail if this process's use of memory rises by more than `most` bytes within the block, if only for a while."""
    before = psutil.Process().memory_info().rss
    with suppress(OSError):  # only Linux can reset the highest use
        Path("/proc/self/clear_refs").write_text("5")
    yield
    status = Path("/proc/self/status")
    highest = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    assert (int(highest[1]) * 1024 if highest else psutil.Process().memory_info().rss) - before < most


def attack(code, folder, server):
    code = code.replace("SECRET", str(folder / "secret")).replace("CANARY", str(folder / "canary"))
    code = code.replace("PORT", str(server.getsockname()[1]))
    started = time.monotonic()
    with memory_bounded(100 * 2**20):
        shown = run_python(code, timeout=TIMEOUT)
    assert time.monotonic() - started < TIMEOUT + SLACK
    assert len(shown) <= MAX_OUTPUT_CHARACTERS
    assert "the-host" not in shown and "root:" not in shown and "HOME" not in shown
    assert not shown.startswith("UserError") and "interpreter crashed" not in shown


def assert_withstood(names, folder, server):
    run_python("1")
    most = os.cpu_count() + 1  # interpreters: those that are kept, and one that another call ends with
    for name in names:
        try:
            attack(attacks()[name](), folder, server)
            assert run_python("12 * 7", timeout=SLACK) == "84"
        except AssertionError as error:
            raise AssertionError(name) from error
    assert len(psutil.Process(sandbox_pool(os.getpid()).sandbox.process.pid).children(recursive=True)) <= most


def test_there_are_enough_attacks():
    assert len(attacks()) == len(BASES) * len(MUTATIONS) >= 400


def test_a_spread_of_attacks_is_withstood(host):
    spread = list(attacks())[::13]  # every mutation: their number and 13 have no common factor
    assert len(spread) >= 60
    assert_withstood(spread, *host)


@pytest.mark.slow
@pytest.mark.parametrize("how", MUTATIONS)
def test_every_attack_is_withstood(host, how):
    assert_withstood([f"{name}, {how}" for name in BASES], *host)
