"""Several processes share an evaluation. Gloo stands in for NCCL."""

import json
import time
from pathlib import Path

import pytest
from evaluation import arguments, run_command, write_core, write_tasks
from other_models import CHATML, gpt2

from evals.evaluate_model import run_evaluation
from evals.harness.processes import ALONE, Processes

BLOCKS_OF_TWO = """
from evals.core import score
score.EXAMPLES_PER_BLOCK = 2
"""
FAIL_IN_THE_SECOND = """
import os
from evals import evaluate_model
def ask(task, *others, original=evaluate_model.ask):
    if task.name == "facts" and os.environ["RANK"] == "1":
        from modeling_nanochat.errors import UserError
        raise UserError("facts: cannot be asked here; ask elsewhere")
    return original(task, *others)
evaluate_model.ask = ask
"""


@pytest.fixture
def files(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def contents(args):
    """What does not depend on time: records, samples and predictions."""
    results = json.loads(Path(args.output_file).read_text(encoding="utf-8"))
    return results["records"], results["samples"], Path(args.output_predictions).read_text(encoding="utf-8")


def test_a_process_alone_has_all_items_and_results():
    items = list(range(7))
    assert ALONE.is_first and ALONE.share(items) == ALONE.gather(items) == items and ALONE.agree("a") == "a"


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_item_belongs_to_one_process(count):
    items = list(range(7))
    shares = [list(Processes(index, count).share(items)) for index in range(count)]
    assert sorted(item for share in shares for item in share) == items


@pytest.mark.slow
@pytest.mark.parametrize(("model", "temperature"), [("nanochat", 0.0), ("nanochat", 1.0), ("gpt2", 1.0)])
def test_two_processes_write_what_one_writes(toy_model_folder, files, model, temperature, monkeypatch):
    """Byte for byte; of sampled replies as well, and with more blocks than processes."""
    monkeypatch.setattr("evals.core.score.EXAMPLES_PER_BLOCK", 2)
    options = {"temperature": temperature, "batch_size": 1, "output_predictions": str(files / "predictions.jsonl")}
    options |= {"samples_per_question": 2} if temperature else {}
    folder = toy_model_folder if model == "nanochat" else gpt2(files / "gpt2", chat_template=CHATML)
    args = arguments(folder, files, **options)
    args.tasks.append(f"core={write_core(files / 'core')}")
    run_evaluation(args)
    expected = contents(args)
    for file in (args.output_file, args.output_predictions):
        Path(file).unlink()
    code, said, errors = run_command(args, processes=2, code=BLOCKS_OF_TWO)
    assert code == 0, errors
    assert contents(args) == expected
    assert said.count(" bits per byte") == 1, said  # one process prints
    assert not Path(f"{args.output_file}.partial").exists()


@pytest.mark.slow
def test_an_error_on_one_process_ends_all_with_one_line_and_the_finished_tasks_are_kept(toy_model_folder, files):
    args = arguments(toy_model_folder, files)
    started = time.monotonic()
    code, _, errors = run_command(args, processes=2, code=FAIL_IN_THE_SECOND)
    assert code != 0 and time.monotonic() - started < 120
    ours = errors.partition("Traceback")[0]  # the launcher's, which reports the exit code
    lines = [line for line in ours.splitlines() if "error" in line.lower()]
    assert lines[:1] == ["error: facts: cannot be asked here; ask elsewhere"], errors
    assert "run_evaluation" not in errors
    assert not Path(args.output_file).exists()
    finished = Path(f"{args.output_file}.partial").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["task"] for line in finished[1:]] == ["bits_per_byte", "problems"]


@pytest.mark.slow
def test_what_all_processes_refuse_is_said_once(toy_model_folder, files):
    code, _, errors = run_command(arguments(toy_model_folder, files, tasks=["facts=absent.jsonl"]), processes=2)
    assert code != 0 and errors.count("no file matches 'absent.jsonl'") == 1, errors
