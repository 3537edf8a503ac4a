"""pass@k on held-out problems during GRPO, the log of completions, and generation by TRL in place of the engine."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from training import forkserver, run
from trl import GRPOTrainer

import recipes.training.trl.completions as completions
from evals.metrics.code_pass.estimate import pass_at_k
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.python_tool import python
from modeling_nanochat.errors import UserError
from recipes.grpo import main
from recipes.training.trl import held_out, rewards
from recipes.training.trl.completions import as_text


@pytest.fixture
def words(toy_model_folder, tmp_path):
    """The command line of a run of 4 steps, evaluated on 3 of 5 held-out problems."""
    for name, count in (("problems", 16), ("held_out", 5)):
        records = [{"question": f"What is {n}+7?", "answer": f"#### {n + 7}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def of(run="run", **settings):
        given = {"model_name_or_path": toy_model_folder, "train_files": tmp_path / "problems.jsonl"}
        given |= {"output_dir": tmp_path / run / "rl", "num_generations": 4, "per_device_train_batch_size": 8}
        given |= {"gradient_accumulation_steps": 1, "max_completion_length": 6, "max_steps": 4, "save_strategy": "no"}
        given |= {"logging_steps": 1, "disable_tqdm": "true"} | settings
        return [word for key, value in given.items() for word in (f"--{key}", *str(value).split())]

    return of


@pytest.fixture
def start(words, tmp_path, monkeypatch):
    def call(run="run", **settings):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *words(run, **settings)])
        main()
        return tmp_path / run / "rl"

    return call


@pytest.fixture
def evaluated(tmp_path):
    return {"eval_files": tmp_path / "held_out.jsonl", "eval_steps": 2, "eval_samples": 3, "eval_problems": 3}


def log_of(output):
    return [json.loads(line) for line in (output.parent / "logs" / "rl.jsonl").read_text().splitlines()]


def every_third_is_right(completion, problem, counted=[]):  # noqa: B006  remembers
    counted.append(problem)
    return len(counted) % 9 in (1, 2, 4)  # of three problems the first twice, the second once, the third never


def test_pass_at_k_is_logged_before_the_first_step_at_intervals_and_at_the_end(start, evaluated, monkeypatch, capsys):
    monkeypatch.setattr(held_out, "is_right", every_third_is_right)
    output = start(**evaluated, max_steps=3)
    rows = [row for row in log_of(output) if "pass@1" in row]
    assert [row["step"] for row in rows] == [0, 2, 3]
    for k in (1, 2, 3):
        expected = pass_at_k([[True, True, False], [True, False, False], [False] * 3], k)
        assert [(row[f"pass@{k}"], row[f"pass@{k}_standard_error"]) for row in rows] == [expected] * 3
    assert [row["step"] for row in log_of(output) if "loss" in row] == [1, 2, 3]
    assert "step 2: pass@1 0.333 ± 0.157, pass@3 0.667 ± 0.272 on held-out problems" in capsys.readouterr().out


def test_a_run_with_evaluation_trains_the_same_model_as_one_without(start, evaluated, monkeypatch):
    monkeypatch.setattr(rewards, "exact_answer", lengths)
    with_it, without = start("with", **evaluated), start("without")
    with_it, without = (load_file(output / "model.safetensors") for output in (with_it, without))
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def lengths(completions, completion_ids, **kwargs):
    return [float(ids[0] % 3) for ids in completion_ids]


def test_the_samples_of_a_problem_share_a_prefill(start, evaluated, monkeypatch):
    asked, complete = [], Engine.complete

    def keep(self, turns, sampler, batch_size, progress=None):
        asked.append([tuple(turn.prompt) for turn in turns])
        return complete(self, turns, sampler, batch_size, progress)

    monkeypatch.setattr(Engine, "complete", keep)
    start(**evaluated, max_steps=1)
    first = asked[0]
    assert len(first) == 9 and len(set(first)) == 3
    assert all(first[i] == first[i + 1] == first[i + 2] for i in (0, 3, 6))


@pytest.mark.slow
def test_two_processes_share_the_held_out_problems(words, evaluated, tmp_path):
    arguments = words("together", **evaluated, per_device_train_batch_size=4, max_steps=1)
    assert run(forkserver(), arguments, stage="grpo", processes=2, before=count_problems(tmp_path)) == 0
    assert len((tmp_path / "graded").read_text().splitlines()) == 2 * 3 * 3  # at steps 0 and 1
    rows = [row for row in log_of(tmp_path / "together" / "rl") if "pass@3" in row]
    assert [row["step"] for row in rows] == [0, 1]


class count_problems:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        def counted(completion, problem):
            with open(self.folder / "graded", "a") as file:
                file.write(problem["question"] + "\n")
            return False

        held_out.is_right = counted


def test_the_log_of_completions_is_bounded_and_shows_no_control_characters(start, monkeypatch, tmp_path):
    monkeypatch.setattr(completions, "MOST_BYTES", 300)
    output = start(max_steps=8, num_train_epochs=2, num_completions_to_print=2)
    logs = output.parent / "logs"
    newest, old = (logs / f"rl.completions{end}.txt" for end in ("", ".old"))
    assert "=== step 8:" in newest.read_text() and max(len(path.read_text()) for path in (newest, old)) < 1000
    message = {"role": "assistant", "content": "\x1b[2Jred\n\u009bx"}
    assert as_text(1, [], [message], {"r": 0.5}) == "=== step 1: r 0.5 ===\nassistant: [2Jred\nx\n\n"
    start("silent", log_completions="false", max_steps=1)
    assert not list((tmp_path / "silent" / "logs").glob("*.txt"))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_vllm": "true", "vllm_gpu_memory_utilization": 0.4, "vllm_mode": "colocate"}, "vLLM"),
        ({"use_transformers_continuous_batching": "true"}, "transformers' continuous batching"),
        ({"use_transformers_paged": "true"}, "transformers' continuous batching"),
    ],
)
def test_trl_generates_in_place_of_the_engine_if_told(settings, name, start, monkeypatch, capsys):
    class Captured(Exception):
        pass

    given = {}

    def capture(self, *args, **kwargs):
        given.update(kwargs)
        raise Captured

    monkeypatch.setattr(GRPOTrainer, "__init__", capture)
    with pytest.raises(Captured):
        start(**settings)
    assert (
        f"completions come from {name} and TRL's loop of tool calls, not from the chat engine"
        in capsys.readouterr().out
    )
    assert given["tools"] == [python] and "rollout_func" not in given
    for key, value in settings.items():
        assert str(getattr(given["args"], key)).lower() == str(value)
    assert given["args"].use_vllm or given["args"].use_transformers_continuous_batching


def test_vllm_that_is_not_installed_is_one_line(start):
    with pytest.raises(UserError, match="^the trainer rejects its settings: .*vLLM") as refusal:
        start(use_vllm="true")
    assert not re.search("\n", str(refusal.value))
