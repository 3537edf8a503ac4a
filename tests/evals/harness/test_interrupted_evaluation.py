"""An evaluation that was interrupted goes on after the last finished task."""

import json
import os
import signal
from pathlib import Path

import pytest
from evaluation import arguments, run_command, write_core, write_lines, write_tasks

from evals import evaluate_model
from evals.evaluate_model import run_evaluation
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_jsonl

ORDER = ["bits_per_byte", "problems", "facts", "letters", "cloze", "core=mats_0", "core=mats_2"]
DIE = """
import os, signal
from evals.harness import partial_results
def append(path, row, original=partial_results.append):
    original(path, row)
    if row["task"] == "{task}":
        os.kill(os.getpid(), signal.SIGKILL)
partial_results.append = append
"""


@pytest.fixture
def files(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def complete(folder, files, **changes):
    args = arguments(folder, files, output_predictions=str(files / "results" / "predictions.jsonl"), **changes)
    core = files / "core"
    args.tasks.append(f"core={core if core.is_dir() else write_core(core)}")
    return args


def stop_after(monkeypatch, count):
    """Make the evaluation fail where the next task would start; `asked` gets the tasks that are run."""
    asked = []

    def ask(task, *others, original=evaluate_model.ask):
        if len(asked) == count:
            raise RuntimeError("interrupted")
        asked.append(task.name)
        return original(task, *others)

    monkeypatch.setattr(evaluate_model, "ask", ask)
    return asked


def contents(args):
    results = json.loads(Path(args.output_file).read_text(encoding="utf-8"))
    return results["records"], results["samples"], [row for _, row in read_jsonl(args.output_predictions)]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["facts", "core=mats_0"])
def test_after_a_kill_the_same_command_goes_on_to_the_same_files(toy_model_folder, files, task):
    args = complete(toy_model_folder, files)
    run_evaluation(args)
    expected = contents(args)
    for file in (args.output_file, args.output_predictions):
        Path(file).unlink()
    code, _, _ = run_command(args, code=DIE.format(task=task))
    assert code == -signal.SIGKILL and not Path(args.output_file).exists()
    code, said, errors = run_command(args)
    assert code == 0, errors
    done = ORDER[: ORDER.index(task) + 1]
    assert said.splitlines()[0] == f"{args.output_file}.partial: goes on after {', '.join(done)}"
    assert contents(args) == expected
    assert not Path(f"{args.output_file}.partial").exists()


def test_finished_tasks_are_not_asked_again(toy_model_folder, files, monkeypatch, capsys):
    args = complete(toy_model_folder, files)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_after(patch, 2)
        run_evaluation(args)
    partial = Path(f"{args.output_file}.partial")
    rows = [row for _, row in read_jsonl(partial)]
    assert [row["task"] for row in rows[1:]] == ORDER[:3]
    with open(partial, "a", encoding="utf-8") as file:  # a kill in the middle of a line
        file.write('{"task": "letters", "seco')
    asked = stop_after(monkeypatch, None)
    results = run_evaluation(args)
    assert asked == ["letters", "cloze"] and "goes on after bits_per_byte, problems, facts" in capsys.readouterr().out
    assert results["seconds"] >= sum(row["seconds"] for row in rows[1:])
    assert not partial.exists()


@pytest.mark.parametrize("change", ["setting", "model", "data", "text", "file"])
def test_with_other_settings_model_or_data_it_starts_anew(toy_model_folder, files, monkeypatch, capsys, change):
    args = complete(toy_model_folder, files)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_after(patch, 2)
        run_evaluation(args)
    if change == "setting":
        args.max_new_tokens = 9
    elif change == "model":
        os.utime(toy_model_folder / "model.safetensors", ns=(1, 1))
    elif change == "data":
        write_lines(files / "facts.jsonl", [{"question": "Who?", "answer": "red", "rivals": ["blue"]}] * 3)
    elif change == "text":
        (files / "val.txt").write_text("The cat sat on the lamp.\n\n" * 30)
    else:
        Path(f"{args.output_file}.partial").write_text("not what it writes\n")
    asked = stop_after(monkeypatch, None)
    run_evaluation(args)
    assert asked == ["problems", "facts", "letters", "cloze"] and "starting anew" in capsys.readouterr().out


def test_other_output_files_and_more_output_do_not_start_it_anew(toy_model_folder, files, monkeypatch):
    args = complete(toy_model_folder, files)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_after(patch, 2)
        run_evaluation(args)
    args.output_predictions, args.verbose = str(files / "elsewhere.jsonl"), True
    asked = stop_after(monkeypatch, None)
    run_evaluation(args)
    assert asked == ["letters", "cloze"] and len(contents(args)[2]) == 6 + 3 + 8 + 4 + 2 * 4


@pytest.mark.parametrize("setting", ["output_file", "output_predictions"])
@pytest.mark.parametrize("fault", ["a folder", "below a file", "nowhere"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(files, setting, fault):
    path = {"a folder": files, "below a file": files / "val.txt" / "x.json", "nowhere": "/proc/nowhere/x.json"}[fault]
    args = arguments("./absent", files, **{setting: str(path)})
    with pytest.raises(UserError, match=f"{setting}: .* cannot be written .*; give another path") as error:
        run_evaluation(args)
    assert "\n" not in str(error.value)
