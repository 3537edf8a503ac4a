import json
import os
import signal
import subprocess
import sys
import time

import pytest

from modeling_nanochat.errors import UserError
from recipes.run import (
    RECIPES,
    RunArguments,
    Step,
    only_run,
    parse_overrides,
    recipe_and_words,
    run_step,
    stage_number,
    steps,
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("depth: 4\n")
    return path


def touching_step(tmp_path, config, name="tokenizer", *more, code="open({!r}, 'a').write('x')"):
    """A step that leaves one character in a file each time that it runs."""
    path = tmp_path / f"{name}.count"
    return Step(name, [sys.executable, "-c", code.format(str(path))], config, list(more)), path


def test_a_finished_step_is_skipped_and_can_be_redone(tmp_path, config):
    step, path = touching_step(tmp_path, config)
    run_step(step, tmp_path, redo=False)
    run_step(step, tmp_path, redo=False)
    assert path.read_text() == "x"
    run_step(step, tmp_path, redo=True)
    assert path.read_text() == "xx"


def test_a_failed_step_is_not_taken_for_finished(tmp_path, config):
    step, _ = touching_step(tmp_path, config, code="import sys; sys.exit(3)")
    with pytest.raises(UserError, match="exit code 3"):
        run_step(step, tmp_path, redo=False)
    assert not (tmp_path / "finished" / "tokenizer.json").exists()


def test_other_settings_for_a_finished_step_are_refused_by_name(tmp_path, config):
    step, path = touching_step(tmp_path, config, "tokenizer", "--vocab_size", "300")
    run_step(step, tmp_path, redo=False)
    config.write_text("depth: 6\n")
    with pytest.raises(UserError, match=r"depth: 4 is now 6.*--from tokenizer"):
        run_step(step, tmp_path, redo=False)
    config.write_text("depth: 4\n")
    changed, _ = touching_step(tmp_path, config, "tokenizer", "--vocab_size", "400")
    with pytest.raises(UserError, match="vocab_size: 300 is now 400"):
        run_step(changed, tmp_path, redo=False)
    assert path.read_text() == "x"


def test_a_changed_evaluation_is_done_again(tmp_path, config):
    step, path = touching_step(tmp_path, config, "base.eval", "--max_examples", "5")
    run_step(step, tmp_path, redo=False)
    run_step(touching_step(tmp_path, config, "base.eval", "--max_examples", "9")[0], tmp_path, redo=False)
    assert path.read_text() == "xx"


def test_a_marker_without_its_result_or_damaged_is_not_believed(tmp_path, config):
    result = tmp_path / "model"
    step, path = touching_step(tmp_path, config, "base", "--output_dir", str(result))
    result.mkdir()
    run_step(step, tmp_path, redo=False)
    run_step(step, tmp_path, redo=False)
    assert path.read_text() == "x"
    result.rmdir()
    run_step(step, tmp_path, redo=False)
    result.mkdir()
    (tmp_path / "finished" / "base.json").write_text('{"conf')
    run_step(step, tmp_path, redo=False)
    assert path.read_text() == "xxx"


def test_a_moved_run_is_still_finished(tmp_path, config):
    before, after = tmp_path / "before", tmp_path / "after"
    run_step(touching_step(tmp_path, config, "tokenizer", "--train_files", f"{before}/data/a")[0], before, redo=False)
    before.rename(after)
    step, path = touching_step(tmp_path, config, "tokenizer", "--train_files", f"{after}/data/a")
    run_step(step, after, redo=False)
    assert path.read_text() == "x"


def test_redoing_a_stage_forgets_what_was_made_from_it(tmp_path, config):
    for name in ("tokenizer", "base", "base.eval", "mid"):
        run_step(touching_step(tmp_path, config, name)[0], tmp_path, redo=False)
    for stage in ("base", "mid"):
        for kind, suffix in (("results", "json"), ("stages", "json"), ("logs", "jsonl")):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{stage}.{suffix}").write_text("{}")
    (tmp_path / "checkpoints" / "mid" / "step-00000004").mkdir(parents=True)
    run_step(touching_step(tmp_path, config, "base")[0], tmp_path, redo=True)
    assert not (tmp_path / "checkpoints" / "mid").exists()
    assert {path.stem for path in (tmp_path / "finished").iterdir()} == {"tokenizer", "base"}
    assert not list((tmp_path / "results").iterdir()) and not (tmp_path / "logs" / "mid.jsonl").exists()


def test_a_stage_that_was_stopped_goes_on_unless_it_is_to_be_redone(tmp_path, config):
    checkpoint = tmp_path / "checkpoints" / "base"
    checkpoint.mkdir(parents=True)
    said = tmp_path / "said"
    code = f"import sys; open({str(said)!r}, 'a').write(' '.join(sys.argv) + '\\n') #"
    step, _ = touching_step(tmp_path, config, "base", code=code + "{}")
    with pytest.raises(UserError, match="base was stopped before its end; the same command goes on from its checkpoint"):
        run_step(step, tmp_path, redo=False)
    with pytest.raises(UserError, match="the same command without --from goes on"):
        run_step(step, tmp_path, redo=True)
    first, second = said.read_text().splitlines()
    assert "--resume auto" in first and "--resume" not in second
    checkpoint.rmdir()
    run_step(step, tmp_path, redo=False)
    assert (tmp_path / "finished" / "base.json").exists()


def test_stopping_the_runner_waits_for_what_its_launcher_left_behind(tmp_path, config):
    """`accelerate launch` dies of SIGTERM at once, while the trainer still writes its checkpoint."""
    path, trainer = tmp_path / "started", tmp_path / "trainer.py"
    trainer.write_text(
        "import pathlib, signal, sys, time\n"
        f"started = pathlib.Path({str(path)!r})\n"
        "def end(*signal):\n"
        "    time.sleep(1)\n"
        "    started.with_name('ended').touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "started.write_text('x')\n"
        "time.sleep(60)\n"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, {str(trainer)!r}])"
    step = Step("tokenizer", [sys.executable, "-c", code], None, [])
    stop_the_runner(step, path, tmp_path)
    assert path.with_name("ended").exists()


def test_misspelt_settings_and_missing_files_are_told_before_anything_runs(tmp_path):
    def run(*words):
        command = [sys.executable, "recipes/run.py", "pocket", "--run_dir", str(tmp_path / "run"), *words]
        return subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, check=False)

    for words, expected in (
        (["--set", "rl.nonsense=5"], "nonsense"),
        (["--grpo_files", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--accelerate_config", "nowhere.yaml"], "nowhere.yaml"),
        (["--pretrain_fles", "x"], "pretrain_fles"),
    ):
        result = run(*words)
        assert result.returncode == 1 and expected in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and "===" not in result.stdout


def test_a_run_folder_is_held_by_one_run(tmp_path):
    with only_run(tmp_path), pytest.raises(UserError, match="in use"), only_run(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="another --run_dir"), only_run(tmp_path / "file"):
        pass


def stop_the_runner(step, path, tmp_path):
    """Run the step, SIGTERM as soon as it has written to `path`."""
    script = (
        "import sys; from pathlib import Path; from recipes.run import Step, run_step; "
        "from modeling_nanochat.errors import exit_on_user_error; "
        f"exit_on_user_error(lambda: run_step(Step('tokenizer', {step.program!r}, None, []), Path({str(tmp_path)!r}), False))"
    )
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=RECIPES.parent, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 30
    while not (path.exists() and path.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    runner.send_signal(signal.SIGTERM)
    _, errors = runner.communicate(timeout=20)
    assert runner.returncode == 1 and "stopped; the same command goes on" in errors


def test_stopping_the_runner_stops_its_stage(tmp_path, config):
    code = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    step, path = touching_step(tmp_path, config, code=code)
    stop_the_runner(step, path, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)
    assert not (tmp_path / "finished").exists()


def commands(stage, **settings):
    args = RunArguments(run_dir="runs/x", accelerate_config="accelerate_configs/cpu.yaml", **settings)
    return steps(stage, RECIPES / "pocket", args, parse_overrides(args.set))


def test_generated_files_fill_in_for_those_not_given():
    (data,) = commands("data")
    assert data.arguments == ["--output_dir", "runs/x/data"]
    train, evaluation = commands("sft", sft_files=["mine/*.jsonl"])
    assert train.arguments[:4] == ["--model_name_or_path", "runs/x/mid", "--train_files", "mine/*.jsonl"]
    assert "facts=runs/x/data/eval/facts.jsonl" in evaluation.arguments
    given = {name: ["f"] for name in ("pretrain_files", "val_files", "midtrain_files", "sft_files", "grpo_files")}
    assert commands("data", **given, eval_files=["a=b"]) == []


def test_overrides_reach_their_stage_only():
    settings = ["pretrain.depth=2", "eval.max_examples=5", "sft.train_files=a,b"]
    train, evaluation = commands("base", set=settings)
    assert train.arguments[-2:] == ["--depth", "2"] and evaluation.arguments[-2:] == ["--max_examples", "5"]
    assert commands("sft", set=settings)[0].arguments[-3:] == ["--train_files", "a", "b"]
    assert commands("mid", set=settings)[0].arguments[-1] != "2"
    for bad in ("depth=2", "base.depth", "nowhere.depth=2"):
        with pytest.raises(UserError, match=bad):
            parse_overrides([bad])


def test_the_tokenizer_is_evaluated_on_the_files_of_the_run():
    train, evaluation = commands("tokenizer", pretrain_files=["a.parquet"], set=["tokenizer_eval.max_bytes=9"])
    assert [train.name, evaluation.name] == ["tokenizer", "tokenizer.eval"]
    assert train.settings["output_dir"] == evaluation.settings["tokenizer"] == ["runs/x/tokenizer"]
    assert evaluation.settings["train_files"] == ["a.parquet"] and evaluation.settings["max_bytes"] == ["9"]
    assert evaluation.settings["val_files"] == ["runs/x/data/pretrain/val.parquet"]
    assert str(evaluation.result) == "runs/x/results/tokenizer.json" and "--max_bytes" not in train.arguments


def test_a_run_from_before_the_tokenizers_evaluation_gets_it_and_keeps_the_rest(tmp_path, toy_model_folder):
    """The step runs for real, in a run folder whose tokenizer and base model were finished without it."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    for file in toy_model_folder.glob("*token*"):
        (tmp_path / "run" / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.jsonl").write_text('{"text": "The cat sat on the mat."}\n')
    (tmp_path / "run" / "finished").mkdir()
    for name in ("tokenizer", "base"):
        (tmp_path / "run" / "finished" / f"{name}.json").write_text("{}")
    files = {name: [str(tmp_path / "text.jsonl")] for name in ("pretrain_files", "val_files")}
    args = RunArguments(run_dir=str(tmp_path / "run"), accelerate_config="accelerate_configs/cpu.yaml", **files)
    _, evaluation = steps("tokenizer", RECIPES / "pocket", args, parse_overrides([]))
    run_step(evaluation, tmp_path / "run", redo=False)
    record = json.loads((tmp_path / "run" / "results" / "tokenizer.json").read_text())
    assert record["texts"][-1]["bytes"] == len("The cat sat on the mat.") and record["vocabularies"][-1]["entries"] == 320
    assert {path.stem for path in (tmp_path / "run" / "finished").iterdir()} == {"tokenizer", "tokenizer.eval", "base"}


def test_redoing_the_tokenizer_forgets_its_evaluation(tmp_path, config):
    for name in ("tokenizer", "tokenizer.eval"):
        run_step(touching_step(tmp_path, config, name)[0], tmp_path, redo=False)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tokenizer.json").write_text("{}")
    run_step(touching_step(tmp_path, config, "tokenizer")[0], tmp_path, redo=True)
    assert {path.stem for path in (tmp_path / "finished").iterdir()} == {"tokenizer"}
    assert not (tmp_path / "results" / "tokenizer.json").exists()


def test_recipe_and_stage_names_are_checked():
    assert recipe_and_words(["pocket", "--from", "sft"])[1][-2:] == ["--from_stage", "sft"]
    assert recipe_and_words(["pocket", "--config", "mine.yaml"]) == ("pocket", ["--config", "mine.yaml"])
    with pytest.raises(UserError, match="pocket"):
        recipe_and_words(["nosuch"])
    assert stage_number("pretrain") == stage_number("base") == 2
    with pytest.raises(UserError, match="'end' is not a stage"):
        stage_number("end")


def test_every_step_records_what_it_depends_on(tmp_path, config):
    step, _ = touching_step(tmp_path, config)
    run_step(step, tmp_path, redo=False)
    assert json.loads((tmp_path / "finished" / "tokenizer.json").read_text())["config"] == {"depth": 4}
