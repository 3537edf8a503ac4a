"""SFT and GRPO as commands: their record, log and checkpoints, what they watch, and what ends them."""

import json
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training import forkserver, run

import recipes.grpo
import recipes.sft
import recipes.training.trl.rewards
import recipes.training.trl.trainer
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.errors import UserError
from modeling_nanochat.modeling_nanochat import NanoChatAttention, NanoChatMLP
from recipes.sft import NanoChatSFTTrainer
from recipes.training.optim.optimizer import muon_adamw

SCRIPTS = {"sft": recipes.sft, "rl": recipes.grpo}


@pytest.fixture
def start(toy_model_folder, tmp_path, monkeypatch):
    """Calls a stage's `main` on a toy model and 16 conversations or problems; returns its output folder."""
    chats = [
        {"messages": [{"role": "user", "content": f"{i}+7?"}, {"role": "assistant", "content": f"It is {i + 7}."}]}
        for i in range(16)
    ]
    problems = [{"question": f"What is {i}+7?", "answer": f"#### {i + 7}"} for i in range(16)]
    for name, records in (("sft", chats), ("rl", problems)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    special = {
        "sft": {"packing": "false"},  # a row is a conversation
        "rl": {
            "num_generations": 4,
            "max_completion_length": 6,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
        },
    }

    def main(stage, run="run", **settings):
        given = {
            "model_name_or_path": toy_model_folder,
            "train_files": tmp_path / f"{stage}.jsonl",
            "output_dir": tmp_path / run / stage,
            "save_strategy": "no",
            "disable_tqdm": "true",
            "per_device_train_batch_size": 4,
            **special.get(stage, {}),
            **settings,
        }
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *words])
        SCRIPTS[stage].main()
        return tmp_path / run / stage

    return main


def record_of(output):
    return json.loads((output.parent / "stages" / f"{output.name}.json").read_text())


def log_of(output):
    return [json.loads(line) for line in (output.parent / "logs" / f"{output.name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_finished_stage_leaves_model_log_and_record_and_nothing_else(stage, start):
    output = start(stage, max_steps=2, num_train_epochs=1, logging_steps=1)
    assert {path.name for path in output.parent.iterdir()} - {f".{stage}.lock"} == {stage, "logs", "stages"}
    assert [row["step"] for row in log_of(output)] == [1, 2]
    settings = record_of(output)["settings"]
    assert settings["output_dir"] == str(output)
    assert not settings.keys() & {"learning_rate", "optim", "num_train_epochs"}
    assert settings["bf16"] == recipes.sft.SFTSettings(output_dir="out").bf16


def test_the_same_command_again_is_already_finished_and_other_settings_are_refused(start, capsys):
    output = start("sft", max_steps=1)
    before = (output / "model.safetensors").stat().st_mtime_ns
    start("sft", max_steps=1)
    assert "already finished" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already exists"):
        start("sft", max_steps=2)


def test_muon_is_compiled_where_that_pays(start, monkeypatch):
    devices, compiled = [], []

    def spy(*args, compile, **options):
        compiled.append(compile)
        return muon_adamw(*args, **options)

    monkeypatch.setattr(recipes.training.trl.trainer, "compiles_on", lambda device: devices.append(device) or True)
    monkeypatch.setattr(recipes.training.trl.trainer, "muon_adamw", spy)
    start("sft", max_steps=1)
    assert compiled == [True] and {device.type for device in devices} == {"cpu"}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_that_goes_on_from_its_checkpoint_ends_bit_identical(stage, start, monkeypatch):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "seed": 7}
    if stage == "rl":
        monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    undisturbed = start(stage, "undisturbed", **settings)
    stop_before_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        start(stage, "run", **settings)
    monkeypatch.undo()
    if stage == "rl":
        monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    output = start(stage, "run", **settings, resume="auto")
    expected, found = load_file(undisturbed / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    key = "loss" if stage == "sft" else "completion_tokens"
    assert [(row["step"], row[key]) for row in log_of(output)] == [
        (row["step"], row[key]) for row in log_of(undisturbed)
    ]
    assert record_of(output)["warnings"] == record_of(undisturbed)["warnings"]
    assert not (output.parent / "checkpoints").exists()


def test_rows_grouped_by_length_keep_their_order_in_a_resumed_epoch(start, monkeypatch):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "logging_steps": 1}
    settings["train_sampling_strategy"] = "group_by_length"
    undisturbed = start("sft", "undisturbed", **settings)
    stop_before_step(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        start("sft", **settings)
    monkeypatch.undo()
    output = start("sft", **settings, resume="auto")
    assert [row["loss"] for row in log_of(output)] == [row["loss"] for row in log_of(undisturbed)]


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_checkpoint_is_named_and_passed_over(start, tmp_path, monkeypatch, capfd, spoil):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    stop_before_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        start("sft", **settings)
    monkeypatch.undo()
    newest = tmp_path / "run" / "checkpoints" / "sft" / "step-00000004"
    spoil(newest / "optimizer-00000-of-00001.safetensors")
    output = start("sft", **settings, resume="auto")
    assert [row["step"] for row in log_of(output)] == [1, 2, 3, 4, 5, 6]
    said = capfd.readouterr()
    assert f"{newest} is damaged (optimizer-00000-of-00001.safetensors" in said.err
    assert f"going on after step 2, from {newest.parent}/step-00000002" in said.out


def test_a_run_from_the_start_leaves_no_older_checkpoint_to_go_on_from(start, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    stop_before_step(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        start("sft", **settings)
    monkeypatch.undo()
    stop_before_step(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        start("sft", **settings, overwrite_output_dir="true")
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "sft").glob("step-*")] == ["step-00000002"]


def test_problems_that_cannot_be_used_end_grpo_or_are_counted(start, tmp_path, capsys):
    with (tmp_path / "rl.jsonl").open("a") as file:
        file.write(json.dumps({"question": "lamp " * 300, "answer": "#### 1"}) + "\n")
        file.write(json.dumps({"question": "Which?", "choices": ["red", "blue"], "answer": 0}) + "\n")
    with pytest.raises(UserError, match="rl.jsonl:18: a record of mmlu; only replies"):
        start("rl", max_steps=1)
    start("rl", max_steps=1, on_bad_row="skip", eval_files=tmp_path / "rl.jsonl", eval_samples=1)
    said = capsys.readouterr().out
    for source in ("rl.jsonl:17: more than 250 tokens leave no room", "rl.jsonl:18: a record of mmlu"):
        assert (
            len(re.findall(f"^left out: 1 rows, first .*{source}", said, re.MULTILINE)) == 2
        )  # eval_files are the same


def test_the_end_says_how_loss_or_reward_went(start, capfd):
    start("sft", max_steps=4, logging_steps=1)
    said = capfd.readouterr()
    assert re.search(
        r"^step 4: loss \d\.\d{3} over the last tenth of the steps, \d\.\d{3} over the first$", said.out, re.MULTILINE
    )
    assert "\r" not in said.out and "{" not in said.out


def alternating(completions, **kwargs):
    return [float(number % 2) for number in range(len(completions))]


def stop_before_step(monkeypatch, step):
    from recipes.training.trl.trainer import LearningCallback

    watched = LearningCallback.on_pre_optimizer_step

    def stop(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            raise KeyboardInterrupt
        watched(self, args, state, control, **kwargs)

    monkeypatch.setattr(LearningCallback, "on_pre_optimizer_step", stop)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_failed_last_act_is_repeated_without_training_again(stage, start, monkeypatch):
    """In the middle of an epoch, where the trainer would take one step more."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 50, "logging_steps": 1, "resume": "auto"}
    settings |= {"per_device_train_batch_size": 8, "num_generations": 2} if stage == "rl" else {}
    undisturbed = start(stage, "undisturbed", **settings)
    monkeypatch.setattr(recipes.training.trl.stage, "finish_stage", Mock(side_effect=UserError("made up")))
    with pytest.raises(UserError, match="made up"):
        start(stage, **settings)
    monkeypatch.undo()
    monkeypatch.setattr(recipes.training.trl.trainer.MuonTrainer, "training_step", None)
    output = start(stage, **settings)
    expected, found = load_file(undisturbed / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [row["step"] for row in log_of(output)] == [1, 2, 3]
    assert not (output.parent / "checkpoints").exists()


def test_completions_for_several_steps_are_trained_on_before_a_checkpoint(start, tmp_path, monkeypatch):
    """Steps 1 and 2 share their completions, 3 and 4, 5 and 6: none are generated twice after a kill."""
    settings = {"max_steps": 8, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    undisturbed = start("rl", "undisturbed", **settings)
    stop_before_step(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        start("rl", **settings)
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "rl").glob("step-*")] == ["step-00000004"]
    monkeypatch.undo()
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    output = start("rl", **settings, resume="auto")
    expected, found = load_file(undisturbed / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_stops_within_its_completions_generates_them_again_for_the_same_problems(start, monkeypatch):
    settings = {"max_steps": 8, "num_iterations": 2, "save_strategy": "no", "resume": "auto"}
    graded = []

    def keep(completions, problem, trainer_state, **kwargs):
        graded.append((trainer_state.global_step, problem))
        return alternating(completions)

    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", keep)
    start("rl", "undisturbed", **settings)
    undisturbed, graded[:] = dict(graded), []
    observe = recipes.training.trl.trainer.LearningCallback.on_pre_optimizer_step

    def ask(self, args, state, control, **kwargs):
        if state.global_step == 2:  # in the third step, before the fourth, which shares its completions
            signal.raise_signal(signal.SIGTERM)
        observe(self, args, state, control, **kwargs)

    monkeypatch.setattr(recipes.training.trl.trainer.LearningCallback, "on_pre_optimizer_step", ask)
    start("rl", **settings)
    start("rl", **settings)
    assert [step for step, _ in graded] == [0, 2, 3, 4, 6] and sorted(undisturbed) == [0, 2, 4, 6]
    assert all(problems == undisturbed[step - step % 2] for step, problems in graded)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 8}, "step-00000002 was trained with seed 7, now it is 8; give the same"),
        ({"per_device_train_batch_size": 2}, "was trained in steps of 4 rows, now they have 2; set per_device"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(changed, message, start, monkeypatch):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "seed": 7}
    stop_before_step(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        start("sft", **settings)
    monkeypatch.undo()
    with pytest.raises(UserError, match=message):
        start("sft", **settings | changed, resume="auto")
    with pytest.raises(UserError, match="holds the checkpoints of an unfinished run; pass --resume auto"):
        start("sft", **settings)
    start("sft", **settings | {"save_steps": 5, "logging_steps": 2}, resume="auto")


def test_a_run_does_not_resume_on_other_data(start, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    stop_before_step(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        start("sft", **settings)
    monkeypatch.undo()
    rows = (tmp_path / "sft.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sft.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match="the checkpoint was trained on 16 rows, now there are 15; give the same data"):
        start("sft", **settings, resume="auto")


def test_what_to_resume_from_must_be_a_checkpoint(start, tmp_path):
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match="--resume .*nowhere: not a checkpoint; give auto, or a folder such as"):
        start("sft", resume=tmp_path / "nowhere")
    assert not (tmp_path / "run" / "sft").exists()


def test_without_a_checkpoint_auto_starts_anew(start, capsys):
    assert (start("sft", max_steps=1, resume="auto") / "model.safetensors").exists()
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("rl", {"per_device_train_batch_size": 80}, "16 problems are too few for a step, which takes 20"),
        (
            "sft",
            {"per_device_train_batch_size": 17, "dataloader_drop_last": "true"},
            "16 rows are too few for a step, which takes 17",
        ),
        ("sft", {"max_steps": 0}, "max_steps 0 trains nothing"),
        ("sft", {"num_train_epochs": 0}, "num_train_epochs must be more than 0"),
        ("sft", {"max_length": 1000}, "max_length 1000 exceeds the model's context of 256 tokens"),
        ("sft", {"max_steps": 1, "reward_weights": "1"}, "reward_weights"),
        ("rl", {"reward_weights": "1 2"}, "reward_weights"),
        ("rl", {"importance_sampling_level": "token", "sync_ref_model": "true", "beta": 0}, "sync_ref_model"),
    ],
)
def test_no_step_no_model(stage, settings, message, start, tmp_path):
    with pytest.raises(UserError) as refusal:
        start(stage, **settings)
    assert message in str(refusal.value)
    assert not (tmp_path / "run" / stage).exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_problem_is_refused_before_the_model_is_read(start, tmp_path, monkeypatch):
    (tmp_path / "rl.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    with pytest.raises(UserError, match="1 problems are too few for a step, which takes 2"):
        start("rl", model_name_or_path=tmp_path / "no model there")


def test_training_that_ends_before_its_last_step_makes_no_model(start, tmp_path, monkeypatch):
    monkeypatch.setattr(NanoChatSFTTrainer, "train", lambda self, resume_from_checkpoint: None)
    with pytest.raises(UserError, match="training ended at step 0 of"):
        start("sft", max_steps=2)
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_stage_before_the_optimizer_uses_it(stage, bad, start, tmp_path, monkeypatch):
    trainer_class = {"sft": NanoChatSFTTrainer, "rl": recipes.grpo.NanoChatGRPOTrainer}[stage]
    step_of = trainer_class.__mro__[2].training_step  # TRL's
    seen = {}

    def spoiled(self, model, *args, **kwargs):
        loss = step_of(self, model, *args, **kwargs)
        if self.state.global_step == 1:
            seen.update(model.state_dict())
            seen.update({name: tensor.clone() for name, tensor in seen.items()})
            if bad == "gradient":
                model.lm_head.weight.grad[0, 0] = torch.nan
            seen["model"] = model
        return loss * torch.nan if bad == "loss" and self.state.global_step == 1 else loss

    monkeypatch.setattr(trainer_class.__mro__[2], "training_step", spoiled)
    with pytest.raises(UserError, match=r"at step 2; the optimizer has not used them\. Lower init_lr_fraction"):
        start(stage, max_steps=4)
    after = seen.pop("model").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in seen.items())
    assert not (tmp_path / "run" / stage).exists()


def test_grpo_reports_once_that_nothing_is_learnt_whatever_is_logged(start, capsys):
    output = start("rl", max_steps=12, logging_strategy="no", num_train_epochs=3)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: no group")]
    assert said == [line for line in said if "from step 1 to step 10" in line]
    assert len(said) == 1
    assert any(
        "no group of completions differed in reward from step 1 to step 12" in line
        for line in record_of(output)["warnings"]
    )


def test_grpo_reports_that_no_completion_ends_by_itself(start, monkeypatch):
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    monkeypatch.setattr(Engine, "sampler", lambda *_: lambda logits, *_: torch.full((len(logits),), 7))
    output = start("rl", max_steps=10, num_train_epochs=2, init_lr_fraction=0.01)
    assert [line.split(" from ")[0] for line in record_of(output)["warnings"]] == ["no completion ended by itself"]


def test_sft_reports_a_loss_that_did_not_fall_and_trains_to_the_end(start, capsys):
    output = start("sft", max_steps=10, matrix_lr=0, embedding_lr=0, unembedding_lr=0, per_device_train_batch_size=16)
    assert "warning: the loss did not fall" in capsys.readouterr().out
    assert "the loss did not fall" in record_of(output)["warnings"][0]
    learning = start("sft", "learning", max_steps=10, init_lr_fraction=0.1, per_device_train_batch_size=16)
    assert record_of(learning)["warnings"] == []


def test_completions_that_are_to_be_logged_lie_beside_the_logs(start):
    output = start("rl", max_steps=1, logging_steps=1, num_completions_to_print=3)
    text = (output.parent / "logs" / "rl.completions.txt").read_text()
    assert text.count("=== step 1: exact_answer 0 ===\nuser: ") == 3
    assert "+7?\nassistant: " in text
    assert not (output.parent / "checkpoints").exists()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_libraries_have_nothing_to_warn_of(stage, start, recwarn, caplog, monkeypatch):
    for library in ("transformers", "trl", "accelerate", "datasets"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    start(stage, max_steps=1)
    assert [
        str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning | UserWarning)
    ] == []
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("stage", SCRIPTS)
def test_attention_is_what_the_key_says_in_training_only(stage, start, monkeypatch):
    asked, forward = Counter(), NanoChatAttention.forward

    def counting(self, *args, **kwargs):
        asked[self.config._attn_implementation] += self.training
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(NanoChatAttention, "forward", counting)
    output = start(stage, max_steps=1, attn_implementation="eager")
    assert +asked == {"eager": asked["eager"]}
    assert "eager" not in (output / "config.json").read_text()
    assert record_of(output)["settings"]["attn_implementation"] == "eager"


def fails_in_the_second_process():
    forward = NanoChatMLP.forward

    def out_of_memory(self, hidden_states):
        if not self.training:
            return forward(self, hidden_states)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if os.environ["RANK"] == "1":
        NanoChatMLP.forward = out_of_memory


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_process_without_memory_ends_all_with_one_line(stage, start, tmp_path):
    with pytest.raises(UserError, match="trains nothing"):
        start(stage, max_steps=0)
    words, said = sys.argv[1:], tmp_path / "said"
    words[words.index("--max_steps") + 1] = "2"
    script, started = {"rl": "grpo"}.get(stage, stage), time.monotonic()
    assert run(forkserver(), words, stage=script, processes=2, before=fails_in_the_second_process, says=said) == 1
    # seconds, the start of the processes included; gloo would wait for half an hour
    assert time.monotonic() - started < 60
    text = said.read_text()
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "Traceback" not in text, text
    batch, lower = {"sft": (4, "max_length"), "rl": (8, "max_completion_length")}[stage]
    assert errors[0].startswith(
        f"error: out of memory with per_device_train_batch_size {batch}: set it to {batch // 2} and "
        f"gradient_accumulation_steps to 2, or set gradient_checkpointing to true, or lower {lower} "
        "(CUDA out of memory"
    )
    assert not (tmp_path / "run" / stage).exists()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_stage_takes_down_its_process_group_once(stage, start, monkeypatch):
    ending = Mock()
    monkeypatch.setattr(Accelerator, "end_training", ending)
    start(stage, max_steps=1)
    ending.assert_called_once_with()
