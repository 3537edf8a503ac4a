"""SFT and GRPO stopped at any instant, and moved to another number of processes: the same command goes on."""

import json
import os
import random
import signal
from functools import partial

import pytest
import torch
import training
from kills import mortal

from recipes.training.checkpoint.files import verify
from recipes.training.checkpoint.folders import checkpoint_folders

SCRIPTS = {"sft": "sft", "rl": "grpo"}
STEPS = 30  # more than two epochs of the conversations' rows, seven of the problems
KILLS = int(os.environ.get("KILLS", "6"))
LOOP = "recipes.training.trl.trainer.MuonTrainer.train"
CALLS_OF_A_SAVE = 20  # of the functions that write checkpoints
EVENTS_OF_A_STEP = {"sft": 5_000, "rl": 20_000}  # calls and returns that Python's profiler sees, roughly


@pytest.fixture(scope="module")
def forks():
    return training.forkserver()


@pytest.fixture
def arguments(toy_model_folder, tmp_path):
    """Makes the command line of a stage: steps of 8 rows of two conversations, or of 4 completions of 2 problems each.

    Steps divide the rows: Accelerate completes the last one, so that all processes have as many.
    """
    chats = [
        {"messages": [{"role": "user", "content": f"{i}+7?"}, {"role": "assistant", "content": f"It is {i + 7}."}]}
        for i in range(100, 308)  # of 17 to 19 tokens each
    ]
    problems = [{"question": f"What is {i}+7?", "answer": f"#### {i + 7}"} for i in range(9)]
    for name, records in (("sft", chats), ("rl", problems)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    special = {
        "sft": {"init_lr_fraction": 0.1, "max_length": 40},
        "rl": {"num_generations": 4, "max_completion_length": 6, "gradient_accumulation_steps": 1},
    }

    def words(stage, run, **settings):
        given = {
            "model_name_or_path": toy_model_folder,
            "train_files": tmp_path / f"{stage}.jsonl",
            "output_dir": tmp_path / run / stage,
            "per_device_train_batch_size": 8,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            "disable_tqdm": "true",
            "seed": 7,
            "resume": "auto",
            **special[stage],
            **settings,
        }
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]

    return words


def rewarding_odd_sums():
    """For `before`: a reward that differs within a group, and depends on the completion only."""
    import recipes.training.trl.rewards

    recipes.training.trl.rewards.exact_answer = odd_sums


def odd_sums(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def dying(**death):
    rewarding_odd_sums()
    mortal(**death, loop=LOOP)


def measurements(output):
    """The log without times."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in training.log_of(output)]


def assert_whole(output):
    """Assert that a killed run left neither a model nor a checkpoint that is not one; return its newest step."""
    assert not output.exists()
    folders = checkpoint_folders(output.parent / "checkpoints" / output.name)
    for folder in folders.values():
        verify(folder)
    return max(folders, default=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
def test_kills_at_any_instant_change_nothing(stage, arguments, forks, tmp_path):
    train = partial(training.run, forks, stage=SCRIPTS[stage])
    undisturbed, killed = tmp_path / "undisturbed" / stage, tmp_path / "killed" / stage
    steps = 5 * KILLS
    assert train(arguments(stage, "undisturbed", max_steps=steps), before=rewarding_odd_sums) == 0

    generator, newest, words = random.Random(0), 0, arguments(stage, "killed", max_steps=steps)
    for kill in range(KILLS):
        if kill % 2:  # every other one dies within a save
            death = {"calls_to_live": generator.randrange(2 * CALLS_OF_A_SAVE)}
        else:
            death = {"events_to_live": generator.randrange(8 * EVENTS_OF_A_STEP[stage])}
        assert train(words, before=partial(dying, **death)) == -signal.SIGKILL, kill
        before, newest = newest, assert_whole(killed)
        assert newest >= before
    assert 0 < newest < steps
    assert train(words, before=rewarding_odd_sums) == 0
    assert measurements(killed) == measurements(undisturbed)
    before, after = training.weights(undisturbed), training.weights(killed)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert not (tmp_path / "killed" / "checkpoints").exists()


def asked_to_stop(step):
    """For `before`: SIGTERM within the given step; completions and rewards depend on the problem only."""
    import recipes.training.trl.rollouts
    from recipes.training.trl.trainer import LearningCallback

    rewarding_odd_sums()
    recipes.training.trl.rollouts.rollouts = scripted
    observe = LearningCallback.on_pre_optimizer_step

    def ask(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        observe(self, args, state, control, **kwargs)

    LearningCallback.on_pre_optimizer_step = ask


def scripted(prompts, trainer):
    """Completions that depend on the prompt and its number within the group only."""
    rendered = [trainer.engine.codec.prompt(prompt) for prompt in prompts]
    first = trainer.accelerator.process_index * len(prompts)
    ids = [[30 + (sum(prompt) + n) % 50] * (1 + n % 4) for n, prompt in enumerate(rendered, start=first)]
    replies = [[{"role": "assistant", "content": "19"}] for _ in ids]
    masks = [[1] * len(each) for each in ids]
    return {"prompt_ids": rendered, "completion_ids": ids, "logprobs": None, "env_mask": masks, "reply": replies}


@pytest.fixture
def undisturbed(arguments, forks, tmp_path):
    """Trains a stage on one process; returns its output folder."""

    def train(stage):
        words = arguments(stage, "undisturbed")
        assert training.run(forks, words, stage=SCRIPTS[stage], before=partial(asked_to_stop, None)) == 0
        return tmp_path / "undisturbed" / stage

    return train


def assert_the_same_course(output, expected):
    """Assert TRL's tolerances: loss 1e-3, mean difference of weights 1e-5."""
    ours, theirs = measurements(output), measurements(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for row, other in zip(ours, theirs, strict=True):
        for key in row:
            assert row[key] == pytest.approx(other[key], abs=1e-3), (row["step"], key)
    before, after = training.weights(expected), training.weights(output)
    assert max((before[name] - after[name]).abs().mean() for name in before | after) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "first", "second"), [("sft", 1, 2), ("rl", 2, 1)])
def test_a_run_that_was_asked_to_stop_goes_on_with_another_number_of_processes(
    stage, first, second, undisturbed, arguments, forks, tmp_path
):
    """In the second epoch; rows per step stay, though rows per process are given for the first number."""
    output, said = tmp_path / "moved" / stage, tmp_path / "said"
    words = arguments(stage, "moved", per_device_train_batch_size=8 // first, save_strategy="no")
    words = [word for word in words if word not in ("--save_steps", "3")]
    train = partial(training.run, forks, words, stage=SCRIPTS[stage], says=said)
    assert train(processes=first, before=partial(asked_to_stop, 17)) == 0
    assert f"SIGTERM received: stopped after step 17 of {STEPS}, checkpoint in" in said.read_text()
    assert assert_whole(output) == 17
    assert train(processes=second, before=partial(asked_to_stop, None)) == 0
    passes = {2: "2 processes x 1 passes x 4 rows", 1: "1 processes x 2 passes x 4 rows"}[second]
    assert f"going on after step 17, from {output.parent}/checkpoints" in said.read_text()
    assert f"each step: {passes}, as many rows as before" in said.read_text()
    assert_the_same_course(output, undisturbed(stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_take_the_course_of_one(stage, undisturbed, arguments, forks, tmp_path):
    words = arguments(stage, "together", per_device_train_batch_size=4)
    before = partial(asked_to_stop, None)
    assert training.run(forks, words, stage=SCRIPTS[stage], processes=2, before=before) == 0
    assert_the_same_course(tmp_path / "together" / stage, undisturbed(stage))
