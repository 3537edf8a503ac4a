"""Kill the trainer at any instant: what it leaves is a run that goes on to the same result, bit for bit."""

import os
import random
import signal
import sys
from functools import partial

import training

KILLS = 20
STEPS = 200
CHECKPOINT_CALLS = ("save_file", "flush", "write_text", "sha256")
CALLS_OF_A_SAVE = 20  # of these functions
EVENTS_OF_A_STEP = 1500  # calls and returns that Python's profiler sees, roughly


def mortal(events_to_live=None, calls_to_live=None):
    """Kills the trainer at that event within training, or at that call of the functions that write checkpoints."""
    import recipes.checkpoint
    import recipes.loop_stage

    if events_to_live is not None:
        recipes.loop_stage.train = watched(recipes.loop_stage.train, events_to_live)
    if calls_to_live is not None:
        remaining = [calls_to_live]
        for name in CHECKPOINT_CALLS:
            setattr(recipes.checkpoint, name, deadly(getattr(recipes.checkpoint, name), remaining))


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


def test_twenty_kills_change_nothing(tmp_path):
    forks, world = training.forkserver(), training.write_world(tmp_path / "world")
    settings = {"max_steps": STEPS, "save_steps": 2, "eval_steps": 50, "per_device_train_batch_size": 8}
    undisturbed, killed = tmp_path / "a" / "base", tmp_path / "b" / "base"
    assert training.run(forks, training.pretrain_arguments(world, undisturbed, **settings)) == 0

    generator = random.Random(0)
    arguments = training.pretrain_arguments(world, killed, **settings, resume="auto")
    for kill in range(KILLS):
        if kill % 2:  # every other one dies within a save
            death = {"calls_to_live": generator.randrange(3 * CALLS_OF_A_SAVE)}
        else:
            death = {"events_to_live": generator.randrange(20 * EVENTS_OF_A_STEP)}
        assert training.run(forks, arguments, before=partial(mortal, **death)) == -signal.SIGKILL, kill
    assert 0 < training.newest_step(killed) < STEPS
    assert training.run(forks, arguments) == 0
    training.assert_identical(killed, undisturbed)
    assert not (tmp_path / "b" / "checkpoints" / "base").exists()
