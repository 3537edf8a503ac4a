"""Kill the trainer at any instant: what it leaves is a run that goes on to the same result, bit for bit."""

import os
import random
import signal
import sys
from multiprocessing import get_context

import pytest
import torch
import training

KILLS = 20
STEPS = 200
CHECKPOINT_CALLS = ("save_file", "flush", "write_text", "sha256")
CALLS_OF_A_SAVE = 20  # of these functions
EVENTS_OF_A_STEP = 1500  # calls and returns that Python's profiler sees, roughly


def child(arguments, events_to_live=None, calls_to_live=None):
    """The trainer. It kills itself at that event within training, or at that call of the functions that write checkpoints."""
    import recipes.checkpoint
    import recipes.loop_stage
    import recipes.pretrain

    torch.set_num_threads(1)
    if events_to_live is not None:
        recipes.loop_stage.train = watched(recipes.loop_stage.train, events_to_live)
    if calls_to_live is not None:
        remaining = [calls_to_live]
        for name in CHECKPOINT_CALLS:
            setattr(recipes.checkpoint, name, deadly(getattr(recipes.checkpoint, name), remaining))
    sys.argv = ["pretrain.py", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    recipes.pretrain.main()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watched(function, events_to_live):
    """`function`, dead at the given call or return of any function, Python's or C's, in the thread that trains."""
    remaining, trainer = events_to_live, os.getpid()

    def count(frame, event, argument):
        nonlocal remaining
        remaining -= 1
        if remaining < 0 and os.getpid() == trainer:  # the loader's process inherits this
            die()

    def wrapped(*args, **kwargs):
        sys.setprofile(count)
        return function(*args, **kwargs)

    return wrapped


def deadly(function, remaining):
    def wrapped(*args, **kwargs):
        remaining[0] -= 1
        if remaining[0] < 0:
            die()
        return function(*args, **kwargs)

    return wrapped


@pytest.fixture(scope="module")
def forks():
    """Processes that start with everything imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["recipes.pretrain", "datasets", "torch._dynamo"])
    return context


def run(forks, arguments, **deaths):
    """Exit code of the trainer."""
    process = forks.Process(target=child, args=(arguments,), kwargs=deaths)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("the trainer hangs")
    return process.exitcode


def test_twenty_kills_change_nothing(tmp_path, forks):
    world = training.write_world(tmp_path / "world")
    settings = {"max_steps": STEPS, "save_steps": 2, "eval_steps": 50, "per_device_train_batch_size": 8}
    undisturbed, killed = tmp_path / "a" / "base", tmp_path / "b" / "base"
    assert run(forks, training.pretrain_arguments(world, undisturbed, **settings)) == 0

    generator = random.Random(0)
    arguments = training.pretrain_arguments(world, killed, **settings, resume="auto")
    for kill in range(KILLS):
        if kill % 2:  # every other one dies within a save
            code = run(forks, arguments, calls_to_live=generator.randrange(3 * CALLS_OF_A_SAVE))
        else:
            code = run(forks, arguments, events_to_live=generator.randrange(20 * EVENTS_OF_A_STEP))
        assert code == -signal.SIGKILL, kill
    assert 0 < newest(tmp_path / "b" / "checkpoints" / "base") < STEPS
    assert run(forks, arguments) == 0
    assert training.curve(killed) == training.curve(undisturbed)
    before, after = training.weights(undisturbed), training.weights(killed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "b" / "checkpoints" / "base").exists()


def newest(folder):
    return max(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
