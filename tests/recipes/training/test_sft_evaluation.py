"""SFT's evaluations at intervals: the loss on held-out conversations, accuracy on tasks, ChatCORE."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from sft import chat, chats, sft_trainer
from training import forkserver, run

from evals.metrics.chat_core.six_tasks import BASELINES, chat_core
from evals.reporting.records import make_record
from evals.tasks.arc import ArcQuestion
from modeling_nanochat.errors import UserError
from recipes.sft import SFTArguments, main
from recipes.training.trl import sft_evaluation
from recipes.training.trl.settings import SFTSettings, parse_settings
from recipes.training.trl.sft_evaluation import TaskArguments


@pytest.fixture
def words(toy_model_folder, tmp_path):
    """The command line of a run of 4 steps on 24 conversations, a quarter of them held out."""
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(24)))
    choices = {"text": ["red", "blue", "green", "grey"], "label": list("ABCD")}
    letters = [{"question": f"Which is {n}?", "choices": choices, "answerKey": "ABCD"[n % 4]} for n in range(9)]
    sums = [{"question": f"What is {n}+7?", "answer": f"#### {n + 7}"} for n in range(9)]
    for name, records in (("letters", letters), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def of(run="run", **settings):
        given = {"model_name_or_path": toy_model_folder, "train_files": tmp_path / "chats.jsonl", "max_length": 100}
        given |= {"output_dir": tmp_path / run / "sft", "per_device_train_batch_size": 2, "max_steps": 4, "seed": 3}
        given |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": "true", "packing": "false"} | settings
        return [word for key, value in given.items() for word in (f"--{key}", *str(value).split())]

    return of


@pytest.fixture
def start(words, tmp_path, monkeypatch):
    def call(run="run", **settings):
        monkeypatch.setattr(sys, "argv", ["sft.py", *words(run, **settings)])
        main()
        return tmp_path / run / "sft"

    return call


@pytest.fixture
def evaluated(tmp_path):
    return {
        "validation_share": 0.25,
        "eval_steps": 3,
        "per_device_eval_batch_size": 2,
        "eval_tasks": f"arc_easy={tmp_path}/letters.jsonl sums={tmp_path}/sums.jsonl",
        "eval_tasks_steps": 2,
        "max_examples": 7,
        "max_new_tokens": 5,
    }


def log_of(output):
    return [json.loads(line) for line in (output.parent / "logs" / "sft.jsonl").read_text().splitlines()]


def figures_of(output):
    """The logged evaluations, without times."""
    timeless = [{key: row[key] for key in row if not key.startswith("seconds")} for row in log_of(output)]
    rows = [row for row in timeless if "tokens" not in row]
    return {row.pop("step"): row for row in rows}


def test_loss_and_accuracy_are_logged_at_their_intervals_and_at_the_end(start, evaluated, capsys):
    output = start(**evaluated)
    figures = figures_of(output)
    tasks = {"arc_easy", "arc_easy_standard_error", "sums", "sums_standard_error"}
    assert {step: row.keys() for step, row in figures.items()} == {
        0: {"validation_loss"},
        2: tasks,
        3: {"validation_loss"},
        4: {"validation_loss"} | tasks,
    }
    assert figures[4]["validation_loss"] < figures[0]["validation_loss"]
    assert figures[2]["arc_easy"] in [right / 7 for right in range(8)]
    said = capsys.readouterr().out
    assert f"step 0: loss {figures[0]['validation_loss']:.4f} on held-out conversations\n" in said
    assert (
        f"step 2: arc_easy {figures[2]['arc_easy']:.3f} ± {figures[2]['arc_easy_standard_error']:.3f}, sums " in said
    )
    assert [row["step"] for row in log_of(output) if "loss" in row] == [1, 2, 3, 4]


def test_tokens_per_second_are_those_of_training(start, evaluated):
    before, evaluation, after = [row for row in log_of(start(**evaluated)) if row["step"] in (2, 3)][:3]
    seconds = after["seconds"] - before["seconds"] - evaluation["seconds_evaluating"]
    assert after["tokens_per_second"] == pytest.approx((after["tokens"] - before["tokens"]) / seconds, rel=0.1)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_with_evaluations_trains_the_same_model_as_one_without(start, evaluated, packing):
    share = {"validation_share": evaluated.pop("validation_share"), "packing": packing}
    with_it, without = start("with", **share, **evaluated), start("without", **share)
    with_it, without = (load_file(output / "model.safetensors") for output in (with_it, without))
    assert all(torch.equal(with_it[name], without[name]) for name in without)


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_the_assistants_tokens_of_all_held_out_conversations(
    packing, toy_model_and_tokenizer
):
    tokenizer = toy_model_and_tokenizer[1]
    held_out, model = chats(tokenizer, 7), random_model("turbo")
    nats = tokens = 0
    for ids, mask in held_out:
        row = torch.tensor(ids.astype(int))[None]
        labels = torch.where(torch.tensor(mask), row, -100)
        with torch.no_grad():
            count = int((labels[:, 1:] != -100).sum())
            nats, tokens = nats + count * model(row, labels=labels, use_cache=False).loss.item(), tokens + count
    settings = {"packing": packing, "max_length": 100, "per_device_eval_batch_size": 2}
    trainer = sft_trainer(model, tokenizer, chats(tokenizer, 9), held_out, **settings)
    trainer.evaluate_on([], TaskArguments())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("missing", [None, "humaneval"])
def test_chat_core_is_there_with_all_six_of_its_tasks(missing, toy_model_and_tokenizer, monkeypatch):
    def evaluate_task(task, asked, model, drawn, **_):
        value = 0.4 if task.name in ("arc_easy", "mmlu") else 0.3
        return SimpleNamespace(records=[make_record(task.name, "accuracy", value, 0.01, 100, {}, model)])

    monkeypatch.setattr(sft_evaluation, "evaluate_task", evaluate_task)
    tasks = [SimpleNamespace(name=name, task=ArcQuestion) for name in BASELINES if name != missing]
    tokenizer = toy_model_and_tokenizer[1]
    trainer = sft_trainer(random_model("plain"), tokenizer, chats(tokenizer, 3))
    trainer.evaluate_on(tasks, TaskArguments())
    trainer.state.global_step = trainer.state.max_steps = 1
    figures = trainer.evaluate()
    accuracies = {task.name: (figures[f"eval_{task.name}"], 0.01) for task in tasks}
    if missing:
        assert "eval_chat_core" not in figures and len(figures) == 11
    else:
        expected = chat_core(accuracies)
        assert (figures["eval_chat_core"], figures["eval_chat_core_standard_error"]) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_two_processes_find_the_same_figures_as_one(packing, start, words, evaluated, tmp_path):
    given = evaluated | {"packing": packing, "init_lr_fraction": 1e-9, "max_steps": 2}
    alone = start("alone", **given)
    arguments = words("together", **given | {"per_device_train_batch_size": 1})
    assert run(forkserver(), arguments, stage="sft", processes=2) == 0
    assert figures_of(tmp_path / "together" / "sft")[0] == figures_of(alone)[0]
    expected, found = figures_of(alone)[2], figures_of(tmp_path / "together" / "sft")[2]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("arc_easy=nowhere.jsonl", "nowhere.jsonl"),
        ("arc_easy={folder}/sums.jsonl", "a record of gsm8k, but the published task arc_easy has those of arc"),
        ("core", "eval_tasks: core is no task of questions"),
        ("arc_medium", "'arc_medium' is not one of"),
    ],
)
def test_the_data_of_tasks_is_checked_before_the_model_is_read(tasks, message, start, tmp_path):
    with pytest.raises(UserError) as refusal:
        start(model_name_or_path=tmp_path / "nowhere", eval_tasks=tasks.format(folder=tmp_path))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_steps": 5}, "eval_steps has no effect unless validation_mixture or validation_share is set"),
        ({"max_examples": 5}, "max_examples has no effect unless eval_tasks is set"),
        ({"validation_share": 2}, "validation_share is 2.0; it is a share, from 0 to 1"),
        ({"validation_share": 0.1, "validation_mixture": "a.jsonl"}, "validation_share has no effect with"),
        ({"validation_share": 0.1, "eval_steps": 0}, "eval_steps must be at least 1, not 0"),
        ({"packing_strategy": "wrapped"}, "packing_strategy wrapped: there are only bfd"),
    ],
)
def test_a_setting_without_effect_is_one_line(settings, message):
    given = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    with pytest.raises(UserError) as refusal:
        parse_settings(SFTArguments, SFTSettings, ["--output_dir", "out", *given])
    assert message in str(refusal.value)


def test_a_mixture_is_held_out(start, tmp_path):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(50, 54)))
    output = start(validation_mixture=tmp_path / "other.jsonl", max_steps=1)
    assert figures_of(output).keys() == {0, 1}
