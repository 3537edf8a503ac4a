"""Stopped, moved to other numbers of processes, damaged: a run goes on, or says why it cannot."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import training
from kills import mortal

STEPS = 60
SETTINGS = {"max_steps": STEPS, "save_steps": 4, "eval_steps": 20}


@pytest.fixture(scope="module")
def forks():
    return training.forkserver()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return training.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world, forks, tmp_path_factory):
    """The run on one process that all others are compared with."""
    output = tmp_path_factory.mktemp("undisturbed") / "base"
    assert training.run(forks, training.pretrain_arguments(world, output, **SETTINGS)) == 0
    return output


def stop_after_a_checkpoint(process, output: Path):
    """SIGTERM once there is a checkpoint."""
    folder = output.parent / "checkpoints" / output.name
    deadline = time.monotonic() + 100
    while not list(folder.glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return training.finish(process)


@pytest.mark.slow
def test_two_nodes_of_one_process_train_the_same_curve(world, undisturbed, forks, tmp_path):
    output = tmp_path / "base"
    arguments = training.pretrain_arguments(world, output, **SETTINGS)
    assert training.run(forks, arguments, processes=2, nodes=2) == 0
    training.assert_the_same_course(output, undisturbed)


@pytest.mark.slow
def test_a_run_moves_from_one_process_to_two(world, undisturbed, forks, tmp_path):
    output, log = tmp_path / "base", tmp_path / "log"
    arguments = training.pretrain_arguments(world, output, **SETTINGS, resume="auto")
    assert training.run(forks, arguments, before=training.ask_to_stop_after_a_checkpoint, says=log) == 0
    said = log.read_text()
    assert "no checkpoint in" in said and "training from the start" in said
    assert "SIGTERM received: stopped after step" in said and "--resume auto goes on" in said
    assert not output.exists()
    assert training.run(forks, arguments, processes=2, says=log) == 0
    said = log.read_text().removeprefix(said)
    assert "going on after step" in said and "2 processes x 1 passes x 4 rows" in said
    training.assert_the_same_course(output, undisturbed)


@pytest.mark.slow
def test_a_run_moves_from_two_processes_to_one(world, undisturbed, forks, tmp_path):
    output = tmp_path / "base"
    arguments = training.pretrain_arguments(world, output, **SETTINGS, resume="auto")
    _, said, errors = stop_after_a_checkpoint(training.start(arguments, processes=2), output)
    assert "SIGTERM received: stopped after step" in said, errors
    shares = sorted((output.parent / "checkpoints" / "base").glob("step-*/optimizer-*"))
    assert shares[-1].name == "optimizer-00001-of-00002.safetensors"
    assert training.run(forks, arguments) == 0
    training.assert_the_same_course(output, undisturbed)


def stopped_run(world, tmp_path, forks):
    """A run that was killed after two checkpoints; its arguments."""
    output = tmp_path / "base"
    arguments = training.pretrain_arguments(world, output, **SETTINGS)
    assert training.run(forks, arguments, before=partial(mortal, calls_to_live=50)) == -signal.SIGKILL
    return output, arguments


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(world, undisturbed, forks, tmp_path):
    output, arguments = stopped_run(world, tmp_path, forks)
    older, newer = sorted((tmp_path / "checkpoints" / "base").glob("step-*"))
    file = newer / "optimizer-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert training.run(forks, [*arguments, "--resume", "auto"], says=tmp_path / "log") == 0
    said = (tmp_path / "log").read_text()
    assert f"{newer} is damaged (optimizer-00000-of-00001.safetensors has changed" in said
    assert f"from {older}" in said
    assert training.curve(output) == training.curve(undisturbed)


@pytest.mark.slow
def test_what_would_bury_or_bend_a_run_is_refused(world, forks, tmp_path):
    _, arguments = stopped_run(world, tmp_path, forks)
    said = tmp_path / "log"
    assert training.run(forks, arguments, says=said) == 1
    assert "holds the checkpoints of an unfinished run; pass --resume auto" in said.read_text().splitlines()[-1]
    assert training.run(forks, [*arguments, "--resume", "auto", "--matrix_lr", "0.01"], says=said) == 1
    assert "was trained with matrix_lr 0.02, now it is 0.01" in said.read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def midtraining(world, undisturbed, tmp_path_factory):
    """Makes the command line of a midtraining run with replayed text, on the model that pretraining left."""
    generator = random.Random(1)

    def said():
        return " ".join(generator.choices(training.WORDS, k=generator.randint(2, 8)))

    conversations = [
        {"messages": [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]}
        for _ in range(80)
    ]
    file = tmp_path_factory.mktemp("conversations") / "train.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in conversations))
    return partial(
        training.midtrain_arguments, undisturbed, file, replay_files=world / "train.parquet", replay_every=2
    )


@pytest.mark.slow
def test_midtraining_goes_on_after_a_kill_and_after_a_signal_bit_for_bit(midtraining, forks, tmp_path):
    undisturbed, disturbed = tmp_path / "a" / "mid", tmp_path / "b" / "mid"
    assert training.run(forks, midtraining(undisturbed), stage="midtrain") == 0
    arguments = midtraining(disturbed, resume="auto")
    killed = training.run(forks, arguments, stage="midtrain", before=partial(mortal, calls_to_live=30))
    assert killed == -signal.SIGKILL and training.newest_step(disturbed) == 4
    assert training.run(forks, arguments, stage="midtrain", before=training.ask_to_stop_after_a_checkpoint) == 0
    assert training.newest_step(disturbed) == 9
    assert training.run(forks, arguments, stage="midtrain") == 0
    training.assert_identical(disturbed, undisturbed)


def test_midtraining_on_two_processes_takes_the_same_course(midtraining, forks, tmp_path):
    one, two = tmp_path / "one" / "mid", tmp_path / "two" / "mid"
    assert training.run(forks, midtraining(one), stage="midtrain") == 0
    assert training.run(forks, midtraining(two), stage="midtrain", processes=2) == 0
    training.assert_the_same_course(two, one)


def failing(name):
    import recipes.training.setup

    def fail(*arguments):
        raise OSError("made up")

    setattr(recipes.training.setup, name, fail)


def never_stepping():
    import recipes.training.loop

    recipes.training.loop.accumulate = None


@pytest.mark.parametrize("last_act", ["finish_stage", "push"])
def test_a_failed_last_act_is_repeated_without_training_again(last_act, world, forks, undisturbed, tmp_path):
    output = tmp_path / "base"
    more = {"resume": "auto", "overwrite_output_dir": "true"}
    arguments = training.pretrain_arguments(world, output, **SETTINGS, **more)
    assert training.run(forks, arguments, before=partial(failing, last_act)) == 1
    assert training.newest_step(output) == STEPS
    assert training.run(forks, arguments, before=never_stepping) == 0
    training.assert_identical(output, undisturbed)
    assert not (tmp_path / "checkpoints" / "base").exists()
