"""What midtraining takes over from the run of its base, and from an interrupted run of its own."""

import json
import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import random_model

from modeling_nanochat.errors import UserError
from recipes.midtrain import MidtrainLoopArguments
from recipes.training.checkpoint.checkpoints import Checkpoints, RunState
from recipes.training.inheritance import check_optimizer_state, find_inheritance, load_optimizer_state
from recipes.training.optim.optimizer import muon_adamw

SETTINGS = {
    "training_recipe": "classic",
    "max_length": 256,
    "total_batch_size": 2048,
    "per_device_train_batch_size": 8,
    "matrix_lr": 0.03,
    "embedding_lr": 0.1,
    "unembedding_lr": 0.005,
    "scalar_lr": 0.25,
    "weight_decay": 0.2,
    "warmdown_ratio": 0.65,
}
OTHERS = ("per_device_train_batch_size", "weight_decay", "warmdown_ratio")
INHERITED = {name: value for name, value in SETTINGS.items() if name not in OTHERS}
NO_CHECKPOINT = "no checkpoint of the last step of .*base is beside it; leave .* --keep_checkpoint true"
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008, "scalar_lr": 0.5}


@pytest.fixture
def base(tmp_path):
    """A base folder with the record of its training."""
    write_record(tmp_path, stage="base", settings=SETTINGS, steps=20)
    (tmp_path / "base").mkdir()
    return str(tmp_path / "base")


def write_record(run, **record):
    (run / "stages").mkdir(exist_ok=True)
    (run / "stages" / "base.json").write_text(json.dumps(record))


def find(base, resume=None, warm_start=False):
    output = os.path.join(os.path.dirname(base), "mid")
    return find_inheritance(MidtrainLoopArguments(resume=resume), base, output, warm_start)


def completed(base, context=4096, **given):
    return find(base).complete(MidtrainLoopArguments(**given), context)


def test_what_is_not_given_is_the_base_runs(base):
    loop = completed(base)
    assert {name: getattr(loop, name) for name in INHERITED} == INHERITED
    assert find(base).values(MidtrainLoopArguments()) == INHERITED
    assert (loop.weight_decay, loop.warmdown_ratio) == (None, None)  # midtraining has its own


@pytest.mark.parametrize("given", [{"matrix_lr": 0.5}, {"training_recipe": "current"}, {"total_batch_size": 512}])
def test_what_is_given_is_not_inherited(base, given):
    loop = completed(base, **given)
    assert {name: getattr(loop, name) for name in INHERITED} == INHERITED | given
    assert find(base).values(MidtrainLoopArguments(**given)).keys() == INHERITED.keys() - given.keys()


def test_minus_one_leaves_the_batch_to_the_dial(base):
    assert completed(base, total_batch_size=-1).overrides().total_batch_size is None


def test_an_inherited_batch_is_whole_rows_of_a_given_length(base):
    assert completed(base, max_length=512).total_batch_size == 2048
    assert completed(base, max_length=300).total_batch_size == 2100
    with pytest.raises(UserError, match="total_batch_size 1000 must be a multiple of max_length 256"):
        completed(base, total_batch_size=1000)


@pytest.mark.parametrize(
    ("given", "rows"), [({}, 8), ({"max_length": 512}, 4), ({"max_length": 4096}, 1), ({"max_length": 100}, 20)]
)
def test_a_pass_has_no_more_tokens_than_the_base_runs(base, given, rows):
    assert find(base).most_rows(completed(base, **given)) == rows


def test_given_rows_are_not_limited(base):
    assert find(base).most_rows(completed(base, per_device_train_batch_size=16)) is None


def test_one_line_says_what_is_inherited_and_from_where(base):
    loop = MidtrainLoopArguments(max_length=300, **RATES)
    line = find(base).line(loop, completed(base, max_length=300, **RATES))
    assert line == (
        f"from the run of {base}: training_recipe classic, total_batch_size 2,100, at most 6 rows per device and pass"
    )
    everything = INHERITED | {"per_device_train_batch_size": 1}
    assert find(base).line(MidtrainLoopArguments(**everything), completed(base, **everything)) is None


@pytest.mark.parametrize("model", ["me/base", "folder", "sft"])
def test_without_a_record_of_pretraining_the_dial_decides_and_one_line_says_so(base, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if model != "me/base":  # a Hub id
        (tmp_path / model).mkdir()
    (tmp_path / "stages" / "sft.json").write_text(json.dumps({"stage": "sft", "settings": SETTINGS}))
    loop = completed(model)
    assert (loop.training_recipe, loop.max_length) == ("current", 2048)
    assert set(loop.overrides().rates.values()) == {None} and loop.total_batch_size is None
    assert completed(model, context=512).max_length == 512
    line = find(model).line(MidtrainLoopArguments(), loop)
    assert line.startswith(f"{model}: no record of its training beside it;") and "dial" in line


def test_a_folder_is_found_by_any_spelling(base, monkeypatch):
    for spelling in (f"{base}/", f"{base}/../base", os.path.relpath(base)):
        assert find(spelling).settings == SETTINGS
    monkeypatch.chdir(base)
    assert find_inheritance(MidtrainLoopArguments(), ".", "../mid", False).settings == SETTINGS


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_length", 0), ("total_batch_size", 2048.0), ("matrix_lr", "0.02"), ("per_device_train_batch_size", "8")],
)
def test_a_record_that_no_run_writes_is_named(base, tmp_path, name, value):
    write_record(tmp_path, stage="base", settings=SETTINGS | {name: value})
    with pytest.raises(UserError, match=f"stages/base.json: {name} is {value!r}; correct it"):
        find(base)


def save(run, name, step, model, run_config=None, recipe="current"):
    """A checkpoint of `model` after an optimizer step; returns the optimizer."""
    optimizer = muon_adamw(model, recipe=recipe, matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoints = Checkpoints(run / "checkpoints" / name, Accelerator(cpu=True))
    shards = {"optimizer": optimizer.sharded_state_dict(), "data": {}}
    checkpoints.save(step, RunState(run_config=run_config or {}), shards, model.state_dict)
    checkpoints.complete()
    return optimizer


@pytest.mark.parametrize("change", ["other record", "no record", "no base", "damaged weights", "damaged state"])
def test_a_resumed_run_keeps_its_values_whatever_has_become_of_the_base(base, tmp_path, change):
    for step in (10, 20):
        save(tmp_path, "mid", step, random_model("plain"), {"max_length": 128, "matrix_lr": 0.07, "scalar_lr": None})
    newest = tmp_path / "checkpoints" / "mid" / "step-00000020"
    if change == "other record":
        write_record(tmp_path, stage="base", settings=SETTINGS | {"matrix_lr": 0.5})
    elif change == "no record":
        shutil.rmtree(tmp_path / "stages")
    elif change == "no base":
        shutil.rmtree(base)
    elif change == "damaged weights":
        os.truncate(newest / "model.safetensors", 100)
    else:
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace("0.07", "0.08"))
    for resume in ("auto", str(tmp_path / "checkpoints" / "mid" / "step-00000010")):
        found = find(base, resume, warm_start=True)  # the base's state is no longer needed
        assert found.values(MidtrainLoopArguments()) == {"max_length": 128, "matrix_lr": 0.07}
        assert found.warm_start is None and found.source == "the interrupted run"


def test_without_a_checkpoint_of_its_own_a_run_that_may_resume_inherits_from_the_base(base, tmp_path):
    assert find(base, "auto").settings == SETTINGS
    save(tmp_path, "mid", 10, random_model("plain"), {"max_length": 128})
    assert find(base, None).settings == SETTINGS  # starts over


def test_the_optimizer_goes_on_from_the_base_runs_last_checkpoint(base, tmp_path):
    before = save(tmp_path, "base", 20, random_model("turbo"))
    found = find(base, warm_start=True)
    assert found.warm_start.step == 20
    assert found.line(MidtrainLoopArguments(), completed(base)).endswith(", optimizer state of step 20")
    optimizer = muon_adamw(random_model("turbo"), matrix_lr=0.5, embedding_lr=0.6, unembedding_lr=0.7)
    rates = [group["lr"] for group in optimizer.param_groups]
    check_optimizer_state(random_model("turbo"), "current", found.warm_start)
    load_optimizer_state(optimizer, found.warm_start)
    ours, theirs = optimizer.sharded_state_dict(), before.sharded_state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(state.abs().sum() > 0 for state in ours.values())
    assert [group["lr"] for group in optimizer.param_groups] == rates


def truncate(tmp_path):
    os.truncate(tmp_path / "checkpoints" / "base" / "step-00000020" / "optimizer-00000-of-00001.safetensors", 9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), NO_CHECKPOINT),
        (lambda run: write_record(run, stage="base", settings=SETTINGS, steps=21), NO_CHECKPOINT),
        (lambda run: write_record(run, stage="sft", settings=SETTINGS, steps=20), NO_CHECKPOINT),
        (lambda run: shutil.rmtree(run / "stages"), NO_CHECKPOINT),
        (truncate, "step-00000020 is damaged .*optimizer.* has 9 bytes instead of .*; leave warm_start out"),
    ],
)
def test_a_warm_start_without_the_state_of_the_last_step_is_refused_in_one_line(base, tmp_path, change, said):
    save(tmp_path, "base", 20, random_model("plain"))
    change(tmp_path)
    with pytest.raises(UserError, match=f"^warm_start: .*{said}") as refused:
        find(base, warm_start=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        (lambda: random_model("plain", hidden_size=32), "current", "has shape .*, the parameter needs"),
        (lambda: random_model("turbo"), "current", "is missing"),
        (lambda: random_model("plain"), "classic", "second_moment is missing"),  # the launch version has none
    ],
)
def test_the_state_of_another_model_or_recipe_is_refused_in_one_line(base, tmp_path, model, recipe, said):
    save(tmp_path, "base", 20, random_model("plain"), recipe=recipe)
    other = muon_adamw(model(), matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01)
    checkpoint, complaint = find(base, warm_start=True).warm_start, "-00000020 is of another model or recipe"
    with pytest.raises(UserError, match=f"^warm_start: .*{complaint} .*{said}") as refused:
        load_optimizer_state(other, checkpoint)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError) as before:
        check_optimizer_state(model(), "current", checkpoint)
    assert str(before.value) == str(refused.value)
