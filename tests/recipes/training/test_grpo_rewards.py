"""Reward functions by import path: what they are given, and what ends a run in one line."""

import json
import os
import sys
import time

import pytest
import torch
import transformers
from training import forkserver, run

import recipes.training.trl.rewards as rewards
import recipes.training.trl.rollouts as trl_rollouts
from modeling_nanochat.errors import UserError
from recipes.grpo import main
from recipes.training.trl.rewards import exact_answer, load_reward

MODULE = """
import math
import numpy
import torch

def length_bonus(completions, **kwargs):
    return [len(completion[-1]["content"] or "") / 100 for completion in completions]

def of_a_tensor(completions, **kwargs):
    return torch.arange(len(completions))

def of_numpy(completions, **kwargs):
    return list(numpy.arange(len(completions), dtype=numpy.float32))

def of_the_record(completions, problem, **kwargs):
    return [float(record["question"].startswith("What")) for record in problem]

def sometimes(completions, **kwargs):
    return [None, 1.0] * (len(completions) // 2)

def from_the_third_step(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 2:
        raise KeyError("grade")
    return list(range(len(completions)))

def not_a_number(completions, **kwargs):
    return [0.0] * (len(completions) - 1) + [math.nan]

def infinite(completions, **kwargs):
    return [math.inf] * len(completions)

def nothing(completions, **kwargs):
    return [None] * len(completions)

def no_return(completions, **kwargs):
    pass

def too_few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good"] * len(completions)

async def later(completions, **kwargs):
    return [1.0] * len(completions)

constant = 3
"""


@pytest.fixture
def start(toy_model_folder, tmp_path, monkeypatch):
    """Trains with reward functions of `my_rewards`, 4 completions of 2 problems a step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    sys.modules.pop("my_rewards", None)
    (tmp_path / "my_rewards.py").write_text(MODULE)
    problems = [{"question": f"What is {n}+7?", "answer": f"#### {n + 7}"} for n in range(16)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    def call(*names, **settings):
        given = {"model_name_or_path": toy_model_folder, "train_files": "problems.jsonl", "output_dir": "run/rl"}
        given |= {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        given |= {"max_completion_length": 6, "max_steps": 1, "save_strategy": "no", "logging_steps": 1} | settings
        words = [word for key, value in given.items() for word in (f"--{key}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", ["grpo.py", *words, "--disable_tqdm", "true", "--reward_funcs", *names])
        main()
        return tmp_path / "run" / "rl"

    return call


def log_of(output):
    return [json.loads(line) for line in (output.parent / "logs" / "rl.jsonl").read_text().splitlines()]


def test_rewards_are_added_by_their_weights(start):
    output = start("exact_answer", "my_rewards.of_the_record", "my_rewards.length_bonus", reward_weights="1 0.5 0")
    assert log_of(output)[0]["reward"] == pytest.approx(0.5)
    record = json.loads((output.parent / "stages" / "rl.json").read_text())
    assert record["settings"]["reward_funcs"][1:] == ["my_rewards.of_the_record", "my_rewards.length_bonus"]
    text = (output.parent / "logs" / "rl.completions.txt").read_text()
    assert "=== step 1: exact_answer 0, of_the_record 1, length_bonus 0." in text


@pytest.mark.parametrize("name", ["of_a_tensor", "of_numpy"])
def test_rewards_may_be_a_tensor_or_numbers_of_numpy(name, start):
    assert log_of(start(f"my_rewards.{name}"))[0]["reward"] == pytest.approx(3.5)


def test_a_completion_that_a_function_does_not_grade_counts_in_no_mean(start):
    assert log_of(start("my_rewards.sometimes"))[0]["reward"] == 1.0


def test_a_function_sees_the_tool_s_result_and_the_record(start, monkeypatch):
    seen, generate = [], trl_rollouts.rollouts

    def with_a_call(prompts, trainer):
        found = generate(prompts, trainer)
        call = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+7"}}}
        reply = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "8"}]
        return found | {"reply": [[*reply, {"role": "assistant", "content": "#### 8"}]] * len(prompts)}

    def look(completions, problem, prompts, **kwargs):
        seen.extend(zip(completions, problem, prompts, strict=True))
        return exact_answer(completions, problem)

    monkeypatch.setattr(trl_rollouts, "rollouts", with_a_call)
    monkeypatch.setattr("recipes.training.trl.rewards.exact_answer", look)
    output = start("exact_answer", num_completions_to_print=100)
    assert len(seen) == 8
    for completion, record, prompt in seen:
        assert [message["role"] for message in completion] == ["assistant", "tool", "assistant"]
        assert prompt[-1]["content"] == record["question"]
    text = (output.parent / "logs" / "rl.completions.txt").read_text()
    assert text.count("+7?\npython: 1+7\ntool: 8\nassistant: #### 8\n\n") == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_a_number", "reward_funcs not_a_number returned 'nan' among the rewards; return finite numbers, or None"),
        ("infinite", "reward_funcs infinite returned 'inf' among the rewards"),
        ("nothing", "reward_funcs nothing: None for all completions of a step"),
        ("no_return", "reward_funcs no_return returned a NoneType; return a list of one number per completion"),
        ("too_few", "reward_funcs too_few returned 1 rewards for 8 completions"),
        ("words", "reward_funcs words returned 'good' among the rewards"),
        ("later", "reward_funcs later returned a coroutine"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_what_a_function_may_not_return_is_one_line_with_its_name(name, message, start, tmp_path):
    with pytest.raises(UserError) as refusal:
        start(f"my_rewards.{name}")
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "rl").exists()


def test_a_function_that_raises_leaves_the_checkpoint_of_the_step_before(start, tmp_path):
    with pytest.raises(UserError, match="^reward_funcs from_the_third_step raised KeyError: 'grade'$"):
        start("my_rewards.from_the_third_step", max_steps=4, save_strategy="steps", save_steps=1)
    checkpoints = tmp_path / "run" / "checkpoints" / "rl"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000001", "step-00000002"]
    (tmp_path / "my_rewards.py").write_text(MODULE.replace("global_step == 2", "global_step == 9"))
    sys.modules.pop("my_rewards")
    output = start(
        "my_rewards.from_the_third_step",
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        resume="auto",
    )
    assert [row["step"] for row in log_of(output)] == [1, 2, 3, 4]


def fails_in_the_second_process():
    def no_grade(completions, **kwargs):
        raise ValueError("no grade\nat all")

    rewards.exact_answer = (
        no_grade if os.environ["RANK"] == "1" else lambda completions, **kwargs: [1] * len(completions)
    )


@pytest.mark.slow
def test_a_function_that_raises_in_one_process_ends_all_with_one_line(start, tmp_path):
    with pytest.raises(UserError, match="trains nothing"):
        start("exact_answer", max_steps=0)
    words, said, started = sys.argv[1:], tmp_path / "said", time.monotonic()
    words[words.index("--max_steps") + 1] = "2"
    assert run(forkserver(), words, stage="grpo", processes=2, before=fails_in_the_second_process, says=said) == 1
    assert time.monotonic() - started < 60  # gloo would wait for half an hour
    text = said.read_text()
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert errors == ["error: reward_funcs no_grade raised ValueError: no grade at all"] and "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length_bonus", "reward_funcs length_bonus: give exact_answer, or an import path such as"),
        ("no_such_module.reward", "no_such_module.reward cannot be imported (ModuleNotFoundError: No module named"),
        ("my_rewards.misspelled", "my_rewards.misspelled cannot be imported (AttributeError: "),
        ("my_rewards.constant", "reward_funcs my_rewards.constant is a int, not a function"),
        ("broken.reward", "broken.reward cannot be imported (SyntaxError: "),
    ],
)
def test_a_path_that_does_not_import_is_refused_before_the_model_is_read(name, message, start, tmp_path):
    (tmp_path / "broken.py").write_text("def reward(:\n")
    with pytest.raises(UserError) as refusal:
        start(name, model_name_or_path="no_model_there")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_number_of_weights_is_that_of_the_functions(start):
    with pytest.raises(UserError, match="reward_weights|reward weights"):
        start("exact_answer", "my_rewards.length_bonus", reward_weights="1")


def test_a_function_of_an_installed_module_is_found():
    assert load_reward("transformers.set_seed") is transformers.set_seed
    assert load_reward("torch.nn.functional.relu") is torch.nn.functional.relu
