"""Stopped, moved to other numbers of processes, damaged: a run goes on, or says why it cannot."""

import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import training
from test_crash import run

STEPS = 60
SETTINGS = {"max_steps": STEPS, "save_steps": 4, "eval_steps": 20}


@pytest.fixture(scope="module")
def forks():
    context = get_context("forkserver")
    context.set_forkserver_preload(["recipes.pretrain", "datasets", "torch._dynamo"])
    return context


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return training.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world, forks, tmp_path_factory):
    """The run on one process that all others are compared with."""
    output = tmp_path_factory.mktemp("undisturbed") / "base"
    assert run(forks, training.pretrain_arguments(world, output, **SETTINGS)) == 0
    return output


def assert_the_same_course(output: Path, undisturbed: Path):
    """TRL's tolerances for the same training on other numbers of processes: loss 1e-3, mean drift of weights 1e-5."""
    ours, expected = training.curve(output), training.curve(undisturbed)
    assert [row[:2] for row in ours] == [row[:2] for row in expected]
    assert max(abs(a[2] - b[2]) for a, b in zip(ours, expected, strict=True)) <= 1e-3
    before, after = training.weights(undisturbed), training.weights(output)
    assert before.keys() == after.keys()
    drift = torch.cat([(before[name] - after[name]).abs().flatten() for name in before])
    assert drift.mean() <= 1e-5


def stop_after_a_checkpoint(process, output: Path):
    """SIGTERM once there is a checkpoint."""
    folder = output.parent / "checkpoints" / output.name
    deadline = time.monotonic() + 100
    while not list(folder.glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return training.finish(process)


def test_two_nodes_of_one_process_train_the_same_curve(world, undisturbed, tmp_path):
    output = tmp_path / "base"
    nodes = training.start_nodes(training.pretrain_arguments(world, output, **SETTINGS))
    for code, _, errors in [training.finish(node) for node in nodes]:
        assert code == 0, errors
    assert_the_same_course(output, undisturbed)


def test_a_run_moves_from_one_process_to_two(world, undisturbed, tmp_path):
    output = tmp_path / "base"
    arguments = training.pretrain_arguments(world, output, **SETTINGS, resume="auto")
    code, said, errors = stop_after_a_checkpoint(training.start(arguments), output)
    assert code == 0, errors
    assert "no checkpoint in" in said and "training from the start" in said
    assert "SIGTERM received: stopped after step" in said and "--resume auto goes on" in said
    assert not output.exists()
    code, said, errors = training.finish(training.start(arguments, processes=2))
    assert code == 0, errors
    assert "going on after step" in said and "2 processes x 1 passes x 4 rows" in said
    assert_the_same_course(output, undisturbed)


def test_a_run_moves_from_two_processes_to_one(world, undisturbed, forks, tmp_path):
    output = tmp_path / "base"
    arguments = training.pretrain_arguments(world, output, **SETTINGS, resume="auto")
    _, said, errors = stop_after_a_checkpoint(training.start(arguments, processes=2), output)
    assert "SIGTERM received: stopped after step" in said, errors
    shares = sorted((output.parent / "checkpoints" / "base").glob("step-*/optimizer-*"))
    assert shares[-1].name == "optimizer-00001-of-00002.safetensors"
    assert run(forks, arguments) == 0
    assert_the_same_course(output, undisturbed)


def stopped_run(world, tmp_path, forks):
    """A run that was killed after two checkpoints; its arguments."""
    output = tmp_path / "base"
    arguments = training.pretrain_arguments(world, output, **SETTINGS)
    assert run(forks, arguments, calls_to_live=50) == -signal.SIGKILL
    return output, arguments


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(world, undisturbed, forks, tmp_path):
    output, arguments = stopped_run(world, tmp_path, forks)
    older, newer = sorted((tmp_path / "checkpoints" / "base").glob("step-*"))
    file = newer / "optimizer-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    code, said, errors = training.finish(training.start([*arguments, "--resume", "auto"]))
    assert code == 0, errors
    assert f"{newer} is damaged (optimizer-00000-of-00001.safetensors has changed" in errors
    assert f"from {older}" in said
    assert training.curve(output) == training.curve(undisturbed)


def test_what_would_bury_or_bend_a_run_is_refused(world, forks, tmp_path):
    _, arguments = stopped_run(world, tmp_path, forks)
    code, _, errors = training.finish(training.start(arguments))
    assert code == 1 and "holds the checkpoints of an unfinished run; pass --resume auto" in errors.splitlines()[-1]
    code, _, errors = training.finish(training.start([*arguments, "--resume", "auto", "--matrix_lr", "0.01"]))
    assert code == 1 and "was trained with matrix_lr 0.02, now it is 0.01" in errors.splitlines()[-1]
