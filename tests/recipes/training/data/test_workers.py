"""Work shared among forked processes: the same results in the same order, and what ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from training import environment

from modeling_nanochat.errors import UserError
from recipes.training.data import workers
from recipes.training.data.workers import ordered_map


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(workers, "FEW", 10)
    monkeypatch.setattr(workers, "BATCH", 4)


@pytest.mark.parametrize("count", [0, 3, 10, 11, 14, 103])
@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_are_those_of_one_process_in_its_order(count, processes):
    def slow_at_times(number):
        time.sleep(0.02 if number % 16 == 10 else 0)
        return number * number

    assert list(ordered_map(slow_at_times, iter(range(count)), processes)) == [n * n for n in range(count)]


def test_what_follows_the_first_items_is_computed_elsewhere():
    found = list(ordered_map(lambda _: os.getpid(), range(40), 2))
    assert set(found[:10]) == {os.getpid()} and os.getpid() not in found[10:] and len(set(found)) == 3


def test_few_items_are_read_ahead():
    read = []

    def items():
        for number in range(1000):
            read.append(number)
            yield number

    results = ordered_map(abs, items(), 2)
    for _ in range(12):
        next(results)
    assert len(read) <= 10 + 4 * 4
    results.close()


def test_a_killed_worker_is_one_line_and_another_error_has_its_traceback():
    def killed(number):
        if number == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match="a process that prepares the data was killed; run again, with more memory"):
        list(ordered_map(killed, range(100), 2))
    with pytest.raises(RuntimeError, match=r"(?s)prepares the data failed:.*ZeroDivisionError"):
        list(ordered_map(lambda number: 1 // (50 - number), range(100), 2))


def test_an_error_of_the_source_comes_after_what_was_read_before_and_leaves_no_process():
    def items():
        yield from range(13)
        raise UserError("broken")

    found = []
    with pytest.raises(UserError, match="broken"):
        for result in ordered_map(lambda number: (number, os.getpid()), items(), 2):
            found.append(result)
    assert [number for number, _ in found] == list(range(10))


@pytest.mark.slow
def test_a_program_that_ends_by_an_error_does_not_wait_for_its_workers():
    program = (
        "from recipes.training.data import workers\n"
        "workers.FEW, workers.BATCH = 2, 1\n"
        "results = workers.ordered_map(abs, range(100), 2)\n"
        "print([next(results) for _ in range(5)])\n"
        "raise SystemExit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False, env=environment(), capture_output=True)
    assert (ended.returncode, ended.stdout) == (3, b"[0, 1, 2, 3, 4]\n")
