"""What pretraining and midtraining refuse when their settings are read: nothing has been opened by then."""

import random
from typing import get_args

import pytest
from accelerate.utils import LoggerType

from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError
from recipes.midtrain import MidtrainArguments, make_plan
from recipes.pretrain import PretrainArguments
from recipes.training.arguments import LoopArguments, Tracker
from recipes.training.data.validation import split
from recipes.training.optim.hyperparameters import RECIPES

PRETRAIN = {"tokenizer": "t", "train_files": "a.txt", "val_files": "b.txt"}
MIDTRAIN = {"model_name_or_path": "m", "train_files": "a.jsonl"}


def pretrain(**more):
    return parse(PretrainArguments, LoopArguments, args=words(PRETRAIN | more))


def midtrain(**more):
    return parse(MidtrainArguments, LoopArguments, args=words(MIDTRAIN | more))


def words(settings):
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize(
    ("key", "wrong", "choices"),
    [
        ("architecture", "turboo", set(ARCHITECTURES)),
        ("training_recipe", "curent", set(RECIPES)),
        ("report_to", "wandbb", {"none"} | {str(one.value) for one in LoggerType}),
    ],
)
def test_a_wrong_word_is_refused_with_the_choices(key, wrong, choices, tmp_path):
    file = tmp_path / "pretrain.yaml"
    file.write_text(f"tokenizer: t\ntrain_files: [a]\nval_files: [b]\n{key}: {wrong}\n")
    for attempt in (
        lambda: pretrain(**{key: wrong}),
        lambda: parse(PretrainArguments, LoopArguments, args=["--config", str(file)]),
    ):
        with pytest.raises(UserError, match=key) as caught:
            attempt()
        assert wrong in str(caught.value) and all(choice in str(caught.value) for choice in choices)
    for choice in choices:
        pretrain(**{key: choice})


def test_the_trackers_are_accelerates():
    assert set(get_args(Tracker)) == {"none"} | {str(one.value) for one in LoggerType}


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (pretrain, {"max_steps": 0}, "max_steps is 0; give a positive number"),
        (pretrain, {"max_steps": -2}, "max_steps is -2"),
        (pretrain, {"target_param_data_ratio": 0}, "target_param_data_ratio is 0"),
        (pretrain, {"target_flops": 0}, "target_flops is 0"),
        (pretrain, {"target_flops": "inf"}, "target_flops is inf"),
        (pretrain, {"depth": 0}, "depth is 0"),
        (pretrain, {"eval_tokens": 0}, "eval_tokens is 0"),
        (pretrain, {"logging_steps": 0}, "logging_steps is 0"),
        (pretrain, {"save_steps": -1}, "save_steps is -1"),
        (pretrain, {"matrix_lr": "nan"}, "matrix_lr is nan"),
        (pretrain, {"warmdown_ratio": 1.5}, "warmdown_ratio is 1.5; it is a share"),
        (pretrain, {"seed": -1}, "seed is -1"),
        (pretrain, {"seed": 2**32}, "seed is 4294967296"),
        (
            pretrain,
            {"total_batch_size": 1000, "max_length": 64},
            "total_batch_size 1000 must be a multiple of max_length 64; take 1024",
        ),
        (pretrain, {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        (pretrain, {"core_steps": 5}, "core_steps has no effect without core_dir"),
        (pretrain, {"core_max_per_task": 5}, "core_max_per_task has no effect without core_dir"),
        (midtrain, {"max_steps": 0}, "max_steps is 0"),
        (midtrain, {"num_train_epochs": 0}, "num_train_epochs is 0"),
        (midtrain, {"num_train_epochs": "nan"}, "num_train_epochs is nan"),
        (midtrain, {"validation_share": 2}, "validation_share is 2"),
        (midtrain, {"replay_every": 4}, "replay_every has no effect without replay_files"),
        (midtrain, {"replay_files": "a.txt", "replay_every": 0}, "replay_every is 0"),
    ],
)
def test_a_number_that_no_run_can_have_is_refused_when_it_is_read(make, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)


def test_settings_that_depend_on_others_have_their_usual_values():
    args, loop = pretrain(core_dir="core", max_steps=-1, core_max_per_task=-1)
    assert (args.core_steps, args.core_max_per_task, loop.max_steps) == (2000, -1, -1)
    assert pretrain()[0].core_steps is None
    assert midtrain(replay_files="a.txt")[0].replay_every == 4


def conversations(count):
    return [(list(range(10)), [1] * 10) for _ in range(count)]


def test_so_few_conversations_that_no_step_results_are_refused():
    config = NanoChatConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    loop = LoopArguments(max_length=16, total_batch_size=320)
    assert make_plan(config, 1000, MidtrainArguments(**MIDTRAIN), loop).max_steps == 3
    for share_of_an_epoch in (0.1, 0.01):
        args = MidtrainArguments(**MIDTRAIN, num_train_epochs=share_of_an_epoch)
        with pytest.raises(UserError, match=f"num_train_epochs {share_of_an_epoch}: .* less than one step of 320"):
            make_plan(config, 1000, args, loop)


def test_a_validation_share_that_leaves_nothing_is_refused():
    assert [len(part) for part in split(conversations(3), 0.5, random.randrange(9))] == [1, 2]
    with pytest.raises(UserError, match=r"validation_share 0.99 leaves no conversation"):
        split(conversations(3), 0.99, 0)
