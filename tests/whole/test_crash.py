"""Kill the trainer at any instant: what it leaves is a run that goes on to the same result, bit for bit."""

import random
import signal
from functools import partial

import pytest
import training
from kills import mortal

KILLS = 20
STEPS = 200
CALLS_OF_A_SAVE = 20  # of these functions
EVENTS_OF_A_STEP = 1500  # calls and returns that Python's profiler sees, roughly


@pytest.mark.slow
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
