"""Midtraining as its command runs it: what it takes over from its base, its schedule, and how it goes on."""

import json
import shutil
import signal
from functools import partial

import pytest
import training
from conftest import toy_model
from kills import mortal
from transformers import AutoTokenizer

from modeling_nanochat import NanoChatConfig
from recipes.midtrain import MidtrainArguments, make_plan
from recipes.training.arguments import LoopArguments

FEW = {"max_steps": 6, "eval_steps": 3, "logging_steps": 1, "save_steps": 2}
RATES = {"matrix_lr": 0.03, "embedding_lr": 0.15, "unembedding_lr": 0.006}


@pytest.fixture(scope="module")
def forks():
    return training.forkserver()


@pytest.fixture(scope="module")
def run(tmp_path_factory, forks):
    """A run folder with a base of uncommon settings, its last checkpoint and conversations."""
    world = training.write_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("run")
    words = training.pretrain_arguments(
        world, folder / "base", **RATES, max_length=64, total_batch_size=512, keep_checkpoint="true"
    )
    assert training.run(forks, words) == 0
    chats = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"I say {i}."}]}
        for i in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run folder, in which anything may be changed."""
    return shutil.copytree(run, tmp_path / "run")


def words(folder, name="mid", **more):
    """A command line without rates, row length or batch."""
    settings = {"model_name_or_path": folder / "base", "output_dir": folder / name, "torch_compile": "false"} | FEW
    settings |= {"train_files": folder / "chats.jsonl"} | more
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def midtrain(forks, folder, name="mid", processes=1, before=None, **more):
    """The exit code, and what the processes said."""
    said = folder / f"{name}.txt"
    arguments = words(folder, name, **more)
    code = training.run(forks, arguments, stage="midtrain", processes=processes, before=before, says=said)
    return code, said.read_text()


def record(folder, name="mid"):
    return json.loads((folder / "stages" / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_kept_checkpoint_is_the_last_one(run):
    assert [path.name for path in (run / "checkpoints" / "base").iterdir()] == ["step-00000012"]


@pytest.mark.slow
def test_a_command_without_rates_trains_like_the_one_that_gives_them(copy, forks):
    code, said = midtrain(forks, copy)
    assert code == 0, said
    (line,) = [line for line in said.splitlines() if "matrix_lr" in line]
    assert line.startswith(f"from the run of {copy / 'base'}: training_recipe current, max_length 64, total_batch")
    assert "matrix_lr 0.03, embedding_lr 0.15, unembedding_lr 0.006" in line
    assert "at most 4 rows per device and pass" in line
    settings, inherited = record(copy)["settings"], record(copy)["inherited"]
    assert {name: inherited[name] for name in RATES} == RATES and inherited["max_length"] == 64
    assert {name: settings[name] for name in inherited} == inherited
    assert settings["per_device_train_batch_size"] == 4
    code, said = midtrain(forks, copy, "given", **inherited, per_device_train_batch_size=4)
    assert code == 0 and "from the run of" not in said
    training.assert_identical(copy / "mid", copy / "given")
    code, said = midtrain(forks, copy)
    assert code == 0 and "already finished with these settings" in said


@pytest.mark.slow
def test_a_model_without_a_record_trains_by_the_dial(copy, forks):
    shutil.move(copy / "base", copy / "downloaded")
    code, said = midtrain(forks, copy, model_name_or_path=copy / "downloaded")
    assert code == 0, said
    assert f"{copy / 'downloaded'}: no record of its training beside it; what is not given is set by the dial" in said
    assert record(copy)["inherited"] == {} and record(copy)["settings"]["max_length"] == 64  # its context
    assert record(copy)["settings"]["matrix_lr"] < 0.01


@pytest.mark.slow
def test_an_interrupted_run_goes_on_after_its_base_has_changed_and_moved(copy, forks):
    assert midtrain(forks, copy, "undisturbed")[0] == 0
    killed, said = midtrain(forks, copy, before=partial(mortal, calls_to_live=30), resume="auto")
    assert killed == -signal.SIGKILL and training.newest_step(copy / "mid") == 2, said
    shutil.rmtree(copy / "checkpoints" / "base")
    (copy / "elsewhere").mkdir()
    shutil.move(copy / "base", copy / "elsewhere" / "base")
    changed = record(copy, "base")
    changed["settings"] |= {"matrix_lr": 0.5, "max_length": 32, "total_batch_size": 64}
    (copy / "elsewhere" / "stages").mkdir()
    (copy / "elsewhere" / "stages" / "base.json").write_text(json.dumps(changed))
    code, said = midtrain(forks, copy, model_name_or_path=copy / "elsewhere" / "base", resume="auto")
    assert code == 0, said
    assert "from the interrupted run: training_recipe current, max_length 64" in said
    training.assert_identical(copy / "mid", copy / "undisturbed")


@pytest.mark.slow
def test_a_warm_start_takes_the_same_course_on_two_processes_and_another_than_a_cold_one(copy, forks):
    for name, more in (
        ("cold", {}),
        ("warm", {"warm_start": "true"}),
        ("two", {"warm_start": "true", "processes": 2}),
    ):
        code, said = midtrain(forks, copy, name, **more)
        assert code == 0 and ("optimizer state of step 12" in said) == (name != "cold"), said
    training.assert_the_same_course(copy / "two", copy / "warm")
    cold, warm = training.curve(copy / "cold"), training.curve(copy / "warm")
    assert [row for row in cold if row[0] <= 1] == [row for row in warm if row[0] <= 1]  # before the first update
    assert cold[-1] != warm[-1]


@pytest.mark.slow
def test_an_interrupted_warm_start_does_not_begin_again(copy, forks):
    assert midtrain(forks, copy, "undisturbed", warm_start="true")[0] == 0
    again = {"warm_start": "true", "resume": "auto"}
    code, said = midtrain(forks, copy, before=training.ask_to_stop_after_a_checkpoint, **again)
    assert code == 0 and "SIGTERM received" in said
    shutil.rmtree(copy / "checkpoints" / "base")
    code, said = midtrain(forks, copy, **again)
    assert code == 0, said
    training.assert_identical(copy / "mid", copy / "undisturbed")


@pytest.mark.slow
def test_another_models_state_and_a_base_of_other_sizes_are_refused_in_one_line(copy, forks):
    code, said = midtrain(forks, copy, before=training.ask_to_stop_after_a_checkpoint, resume="auto")
    assert code == 0 and "SIGTERM received" in said
    tokenizer = AutoTokenizer.from_pretrained(copy / "base")
    toy_model(tokenizer, width=64, context=64).save_pretrained(copy / "base")
    for name, more, problem in (
        ("mid", {"resume": "auto"}, "is of another model than this run's now (size mismatch for"),
        ("warm", {"warm_start": "true"}, "is of another model or recipe (optimizer state"),
    ):
        code, said = midtrain(forks, copy, name, **more)
        assert code == 1 and problem in said.splitlines()[-1], said


@pytest.mark.parametrize("recipe", ["classic", "current"])
def test_the_launchs_schedule_is_the_default_for_both_recipes(recipe):
    """Constant, then linear to zero over the last fifth; momentum to 0.95 in 300 steps; no clipping, no decay."""
    plan = planned(training_recipe=recipe, max_steps=1000)
    schedule = plan.schedule()
    rates = [schedule.learning_rate_multiplier(step) for step in (0, 400, 800, 900, 950, 999)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.25, 0.005])
    assert [schedule.momentum(step) for step in (0, 150, 300, 999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert (plan.max_grad_norm, plan.weight_decay) == (None, 0.0)
    assert any(
        line.startswith("  stage default: ") and "warmdown_ratio 0.2" in line and "weight_decay 0" in line
        for line in plan.lines()
    )


def test_every_value_of_the_schedule_can_be_given():
    given = {"warmup_steps": 5, "warmdown_ratio": 0.5, "final_lr_fraction": 0.1, "momentum_steps": 10}
    given |= {"peak_momentum": 0.97, "final_momentum": 0.9, "weight_decay": 0.3}
    plan = planned(max_steps=100, **given)
    assert {name: plan.origins[name] for name in given} == dict.fromkeys(given, "given")
    schedule = plan.schedule()
    assert schedule.learning_rate_multiplier(0) == 0.2 and schedule.learning_rate_multiplier(75) == pytest.approx(0.55)
    assert [schedule.momentum(step) for step in (10, 50, 75)] == pytest.approx([0.97, 0.97, 0.935])
    assert plan.weight_decay == 0.3


def test_the_plan_tells_inherited_from_given_values():
    plan = planned(inherited={"matrix_lr", "max_length"}, max_steps=9, matrix_lr=0.02, embedding_lr=0.1)
    assert "  inherited: matrix_lr 0.02" in plan.lines()
    assert any("given:" in line and "embedding_lr" in line for line in plan.lines())


def planned(inherited=(), **given):
    config = NanoChatConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    args = MidtrainArguments(model_name_or_path="m", train_files=["a.jsonl"])
    return make_plan(config, 1000, args, LoopArguments(max_length=16, **given), inherited)
