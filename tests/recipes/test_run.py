import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.ladder.arguments import RunArguments, parse_overrides, stage_number
from recipes.ladder.commands import RECIPES, steps
from recipes.ladder.execution import only_run, run_step
from recipes.ladder.launch import launcher
from recipes.ladder.plan import make_plan
from recipes.ladder.step import Step, difference
from recipes.run import main, recipe_and_words
from recipes.training.data.mixtures import parse_mixture


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("depth: 4\n")
    return path


def touching_step(tmp_path, config, name="tokenizer", *more, code="open({!r}, 'a').write('x')"):
    """A step that leaves one character in a file each time that it runs."""
    path = tmp_path / f"{name}.count"
    return Step(name, [sys.executable, "-c", code.format(str(path))], config, list(more)), path


MAKING = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(exist_ok=True)
(folder / "weights").open("a").write("x")
(folder.parent / "said").open("a").write(" ".join(sys.argv) + "\\n")
record = folder.parent / "stages" / f"{folder.name}.json"
record.parent.mkdir(exist_ok=True)
"""
FINISHING = "record.write_text('{}')"


def making_step(run_dir, config, name="base", *more, ending=FINISHING):
    """A stage that adds one character to its folder's weights each time that it runs, and writes its record."""
    program = [sys.executable, "-c", MAKING + ending]
    return Step(name, program, config, ["--output_dir", str(run_dir / name), *more])


def run_all(run_dir, *steps, first=None):
    """What the runner does with these steps, `first` being the stage of `--from`; gives the names of the steps run."""
    ladder = {}
    for step in steps:
        ladder.setdefault(step.name.partition(".")[0], []).append(step)
    plan = make_plan(ladder, run_dir, first and stage_number(first))
    for step, todo, redo in plan:
        if todo:
            run_step(step, run_dir, redo)
    return [step.name for step, todo, _ in plan if todo]


def weights(run_dir, name="base"):
    return (run_dir / name / "weights").read_text()


def test_a_finished_step_is_skipped_and_can_be_redone(tmp_path, config):
    step = making_step(tmp_path, config)
    assert run_all(tmp_path, step) == ["base"] and run_all(tmp_path, step) == []
    assert run_all(tmp_path, step, first="base") == ["base"] and weights(tmp_path) == "xx"


def test_a_failed_step_is_not_taken_for_finished(tmp_path, config):
    step, _ = touching_step(tmp_path, config, code="import sys; sys.exit(3)")
    with pytest.raises(UserError, match="exit code 3"):
        run_all(tmp_path, step)
    assert not (tmp_path / "finished" / "tokenizer.json").exists()
    assert run_all(tmp_path, touching_step(tmp_path, config)[0]) == ["tokenizer"]


def test_other_settings_for_a_finished_step_are_refused_by_name(tmp_path, config):
    run_all(tmp_path, making_step(tmp_path, config, "tokenizer", "--vocab_size", "300"))
    config.write_text("depth: 6\n")
    with pytest.raises(UserError, match=r"depth: 4 is now 6.*--from tokenizer"):
        run_all(tmp_path, making_step(tmp_path, config, "tokenizer", "--vocab_size", "300"))
    config.write_text("depth: 4\n")
    with pytest.raises(UserError, match="vocab_size: 300 is now 400"):
        run_all(tmp_path, making_step(tmp_path, config, "tokenizer", "--vocab_size", "400"))
    assert weights(tmp_path, "tokenizer") == "x"


def test_a_changed_evaluation_is_done_again(tmp_path, config):
    step, path = touching_step(tmp_path, config, "base.eval", "--max_examples", "5")
    run_all(tmp_path, step)
    run_all(tmp_path, touching_step(tmp_path, config, "base.eval", "--max_examples", "9")[0])
    assert path.read_text() == "xx"


def test_a_marker_without_its_result_or_damaged_is_not_believed(tmp_path, config):
    step = making_step(tmp_path, config)
    run_all(tmp_path, step)
    shutil.rmtree(tmp_path / "base")
    assert run_all(tmp_path, step) == ["base"]
    (tmp_path / "finished" / "base.json").write_text('{"conf')
    assert run_all(tmp_path, step) == ["base"] and weights(tmp_path) == "xx"


def test_a_moved_run_is_still_finished(tmp_path, config):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    run_all(before, making_step(before, config, "tokenizer", "--train_files", f"{before}/data/a"))
    before.rename(after)
    assert run_all(after, making_step(after, config, "tokenizer", "--train_files", f"{after}/data/a")) == []


def test_redoing_a_stage_forgets_what_was_made_from_it(tmp_path, config):
    steps = [making_step(tmp_path, config, name) for name in ("tokenizer", "base", "mid")]
    evaluation, _ = touching_step(tmp_path, config, "base.eval")
    run_all(tmp_path, *steps, evaluation)
    for kind, suffix in (("results", "json"), ("logs", "jsonl")):
        (tmp_path / kind).mkdir(exist_ok=True)
        for stage in ("base", "mid"):
            (tmp_path / kind / f"{stage}.{suffix}").write_text("{}")
    (tmp_path / "checkpoints" / "mid" / "step-00000004").mkdir(parents=True)
    run_step(steps[1], tmp_path, redo=True)
    assert not (tmp_path / "checkpoints" / "mid").exists()
    assert {path.stem for path in (tmp_path / "finished").iterdir()} == {"tokenizer", "base"}
    assert {path.stem for path in (tmp_path / "stages").iterdir()} == {"tokenizer", "base"}
    assert [path.stem for path in (tmp_path / "logs").iterdir()] == ["base"]
    # what was forgotten is made again unasked, since it was the run's own
    assert run_all(tmp_path, *steps[:2], evaluation, steps[2]) == ["base.eval", "mid"]


def test_what_follows_from_a_stage_that_is_missing_is_made_again(tmp_path, config):
    steps = [making_step(tmp_path, config, name) for name in ("base", "mid", "sft")]
    run_all(tmp_path, *steps)
    shutil.rmtree(tmp_path / "mid")
    assert run_all(tmp_path, *steps) == ["mid", "sft"] and weights(tmp_path) == "x"


def test_a_model_that_an_orphaned_stage_finished_is_not_trained_again(tmp_path, config):
    """The runner was killed while the stage ran; the stage went on, and wrote its record."""
    step = making_step(tmp_path, config)
    run_all(tmp_path, step)
    orphan_finished(tmp_path)
    assert run_all(tmp_path, step) == [] and weights(tmp_path) == "x"
    config.write_text("depth: 6\n")
    with pytest.raises(UserError, match=r"depth: 4 is now 6.*--from base"):
        run_all(tmp_path, step)
    config.write_text("depth: 4\n")
    (tmp_path / "stages" / "base.json").unlink()  # killed before its end
    assert run_all(tmp_path, step) == ["base"]


def orphan_finished(run_dir):
    """As if the runner had been killed after it began the step, and had not seen its end."""
    (run_dir / "started").mkdir(exist_ok=True)
    content = json.loads((run_dir / "finished" / "base.json").read_text())
    del content["seconds"]
    (run_dir / "started" / "base.json").write_text(json.dumps(content))
    (run_dir / "finished" / "base.json").unlink()


def test_an_evaluation_that_an_orphan_finished_is_not_done_again(tmp_path, config):
    result = tmp_path / "results" / "base.json"
    result.parent.mkdir()
    step, path = touching_step(
        tmp_path, config, "base.eval", "--output_file", str(result), code="open({!r}, 'a').write('x')"
    )
    with pytest.raises(UserError, match=r"base.eval was stopped before its end"):  # no result
        run_all(tmp_path, step)
    result.write_text("{}")
    assert run_all(tmp_path, step) == [] and path.read_text() == "x"


@pytest.mark.parametrize("with_record", [True, False])
def test_a_model_that_the_run_did_not_make_is_left_alone(tmp_path, config, with_record):
    """Trained by hand, or copied in."""
    steps = [making_step(tmp_path, config, name) for name in ("base", "mid")]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_text("mine")
    if with_record:
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages" / "base.json").write_text('{"settings": {"depth": 4}}')
    with pytest.raises(UserError, match=r"base exists but was not created by this run.*--from base.*--from mid"):
        run_all(tmp_path, *steps)
    assert not (tmp_path / "mid").exists()
    assert run_all(tmp_path, *steps, first="mid") == ["mid"]
    assert weights(tmp_path) == "mine" and (tmp_path / "stages" / "base.json").exists() == with_record
    assert run_all(tmp_path, *steps, first="base") == ["base", "mid"] and weights(tmp_path) == "minex"


def test_a_run_that_stops_early_leaves_later_models_of_others_alone(tmp_path, config):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "mid.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mid.jsonl").write_text("{}")
    run_all(tmp_path, making_step(tmp_path, config))
    assert (tmp_path / "stages" / "mid.json").exists() and (tmp_path / "logs" / "mid.jsonl").exists()


def test_a_stage_that_was_stopped_goes_on_unless_it_is_to_be_redone(tmp_path, config):
    (tmp_path / "checkpoints" / "base" / "step-00000004").mkdir(parents=True)
    stopped = making_step(tmp_path, config, ending="")
    with pytest.raises(
        UserError, match="base was stopped before its end; the same command continues from its checkpoint"
    ):
        run_all(tmp_path, stopped)
    with pytest.raises(UserError, match="the same command without --from continues"):
        run_all(tmp_path, stopped, first="base")
    first, second = (tmp_path / "said").read_text().splitlines()
    assert "--resume auto" in first and "--resume" not in second
    assert run_all(tmp_path, making_step(tmp_path, config)) == ["base"]
    assert (tmp_path / "finished" / "base.json").exists() and not list((tmp_path / "started").iterdir())


def test_stopping_the_runner_waits_for_what_its_launcher_left_behind(tmp_path, config):
    """`accelerate launch` dies of SIGTERM at once, while the trainer still writes its checkpoint."""
    path, trainer = tmp_path / "begun", tmp_path / "trainer.py"
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
    returned, errors = stop_the_runner(step, path, tmp_path)
    assert returned == 1 and "stopped; the same command continues" in errors
    assert path.with_name("ended").exists()


def test_a_run_folder_is_held_by_one_run(tmp_path):
    with only_run(tmp_path), pytest.raises(UserError, match="in use"), only_run(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="another --run_dir"), only_run(tmp_path / "file"):
        pass


def stop_the_runner(step, path, tmp_path, number=signal.SIGTERM, nohup=False):
    """Run the step in a process of its own, send the signal as soon as the step has written to `path`.

    Gives the exit code and what was said on stderr.
    """
    errors = tmp_path / "errors"
    runner = os.fork()
    if not runner:
        code = 0
        try:
            sys.stderr = errors.open("w")
            signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
            exit_on_user_error(lambda: run_step(step, tmp_path, redo=False))
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.time() + 30
    while not (path.exists() and path.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(runner, number)
    _, status = os.waitpid(runner, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopping_the_runner_or_closing_its_terminal_stops_its_stage(tmp_path, config, number):
    """Each by the signal that the runner got: at a hangup the stage has no terminal to write to."""
    got = tmp_path / "got"
    code = (
        "import os, signal, sys, time; end = lambda number, _: sys.exit(open({got!r}, 'w').write(str(number))); "
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGHUP, end); "
        "open({{!r}}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    step, path = touching_step(tmp_path, config, code=code.format(got=str(got)))
    returned, errors = stop_the_runner(step, path, tmp_path, number)
    assert returned == 1 and "stopped; the same command continues" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)
    assert got.read_text() == str(int(number)) and not (tmp_path / "finished").exists()


def test_under_nohup_a_run_outlives_its_terminal(tmp_path, config):
    code = "import time; open({!r}, 'w').write('x'); time.sleep(1)"
    step, path = touching_step(tmp_path, config, code=code)
    returned, _ = stop_the_runner(step, path, tmp_path, signal.SIGHUP, nohup=True)
    assert returned == 0 and (tmp_path / "finished" / "tokenizer.json").exists()


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
    assert commands("data", **given, eval_tasks=["a=b"]) == []


def test_overrides_reach_their_stage_only():
    settings = ["pretrain.depth=2", "eval.max_examples=5", "sft.train_files=a,b"]
    train, evaluation = commands("base", set=settings)
    assert train.arguments[-2:] == ["--depth", "2"] and evaluation.arguments[-2:] == ["--max_examples", "5"]
    assert commands("sft", set=settings)[0].arguments[-3:] == ["--train_files", "a", "b"]
    assert commands("mid", set=settings)[0].arguments[-1] != "2"
    for bad in ("depth=2", "base.depth", "nowhere.depth=2"):
        with pytest.raises(UserError, match=bad):
            parse_overrides([bad])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[{source: a, epochs: 2}, b]", ['{"source": "a", "epochs": 2}', "b"]),
        ("One day,The end", ["One day", "The end"]),
        ('["Once upon a time, there", One day]', ["Once upon a time, there", "One day"]),
        ('"Once upon a time, there"', ["Once upon a time, there"]),
        ("'it is, \"so\"'", ['it is, "so"']),
        ("[0.5, 2, true]", ["0.5", "2", "true"]),
    ],
)
def test_an_override_can_hold_a_comma(value, words):
    assert parse_overrides([f"base.sample_prompts={value}"])["base"] == ["--sample_prompts", *words]


@pytest.mark.parametrize("value", ["[a", "[]", "[null]", "[[a]]", '"a'])
def test_an_override_that_is_no_list_of_values_is_refused(value):
    with pytest.raises(UserError, match="--set base.sample_prompts") as error:
        parse_overrides([f"base.sample_prompts={value}"])
    assert "\n" not in str(error.value)


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
        (tmp_path / "run" / "finished" / f"{name}.json").write_text('{"arguments": {}, "config": {}}')
    files = {name: [str(tmp_path / "text.jsonl")] for name in ("pretrain_files", "val_files")}
    args = RunArguments(run_dir=str(tmp_path / "run"), accelerate_config="accelerate_configs/cpu.yaml", **files)
    _, evaluation = steps("tokenizer", RECIPES / "pocket", args, parse_overrides([]))
    run_step(evaluation, tmp_path / "run", redo=False)
    record = json.loads((tmp_path / "run" / "results" / "tokenizer.json").read_text())
    assert (
        record["texts"][-1]["bytes"] == len("The cat sat on the mat.") and record["vocabularies"][-1]["entries"] == 320
    )
    assert {path.stem for path in (tmp_path / "run" / "finished").iterdir()} == {"tokenizer", "tokenizer.eval", "base"}


def test_redoing_the_tokenizer_forgets_its_evaluation(tmp_path, config):
    step = making_step(tmp_path, config, "tokenizer")
    run_all(tmp_path, step, touching_step(tmp_path, config, "tokenizer.eval")[0])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tokenizer.json").write_text("{}")
    run_step(step, tmp_path, redo=True)
    assert {path.stem for path in (tmp_path / "finished").iterdir()} == {"tokenizer"}
    assert not (tmp_path / "results" / "tokenizer.json").exists()


def test_recipe_and_stage_names_are_checked():
    assert recipe_and_words(["pocket", "--config", "mine.yaml"]) == ("pocket", ["--config", "mine.yaml"])
    with pytest.raises(UserError, match="pocket"):
        recipe_and_words(["nosuch"])
    assert stage_number("pretrain") == stage_number("base") == 2
    with pytest.raises(UserError, match="'end' is not a stage"):
        stage_number("end")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_row_of_the_stage_table_names_a_script_and_an_earlier_stage(stage):
    assert (RECIPES / f"{stage.script}.py").is_file() and (RECIPES / "pocket" / f"{stage.script}.yaml").is_file()
    assert stage_number(stage.script) == stage_number(stage.name)
    if stage.predecessor:
        assert stage_number(stage.predecessor) < stage_number(stage.name)


@pytest.mark.parametrize("words", [["--help"], ["pocket", "--help"], ["pocket", "--from", "sft", "-h"]])
def test_help_names_every_option_and_recipe(words, capsys):
    with pytest.raises(SystemExit) as end:
        recipe_and_words(words)
    assert end.value.code == 0
    said = capsys.readouterr().out
    for option in ("--from", "--to", "--set", "--sft_files", "pocket", "speedrun"):
        assert option in said


def test_a_run_that_would_do_nothing_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--from sft comes after --to base"):
        call_main(monkeypatch, tmp_path / "run", "--from", "sft", "--to", "base")
    assert not (tmp_path / "run").exists()


def call_main(monkeypatch, run_dir, *words):
    monkeypatch.setattr(sys, "argv", ["run.py", "pocket", "--run_dir", str(run_dir), *words])
    main()


SAVING_AT_THE_END = """
import signal, time
def end(*signal):
    (folder.parent / "checkpoints" / folder.name / "step-00000004").mkdir(parents=True, exist_ok=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""


def test_after_max_hours_the_stage_saves_and_the_run_says_what_comes_next(tmp_path, config, monkeypatch, capsys):
    base, mid = (making_step(tmp_path, config, name, ending=SAVING_AT_THE_END) for name in ("base", "mid"))
    monkeypatch.setattr("recipes.run.steps", lambda stage, *_: {"base": [base], "mid": [mid]}.get(stage, []))
    monkeypatch.setattr("recipes.run.check_pending", lambda *_: None)
    monkeypatch.setattr("recipes.run.closing_lines", lambda *_: [])
    call_main(monkeypatch, tmp_path, "--max_hours", "0.0003")
    assert capsys.readouterr().out.endswith(
        "max_hours 0.0003 reached; the same command resumes base from its checkpoint\n"
    )
    assert (tmp_path / "started" / "base.json").exists() and not (tmp_path / "mid").exists()
    call_main(monkeypatch, tmp_path, "--max_hours", "0.0003", "--from", "base")
    assert "the same command without --from resumes base" in capsys.readouterr().out
    base.program[2] = mid.program[2] = MAKING + FINISHING
    call_main(monkeypatch, tmp_path, "--max_hours", "1")
    assert (tmp_path / "said").read_text().splitlines()[2].endswith("--resume auto") and (tmp_path / "mid").exists()


@pytest.mark.parametrize("hours", ["0", "-1", "inf", "nan", "soon"])
def test_hours_that_are_no_positive_number_are_refused(tmp_path, monkeypatch, hours):
    with pytest.raises(UserError, match="max_hours"):
        call_main(monkeypatch, tmp_path / "run", "--max_hours", hours)


YAMLS = ("world", "tokenizer", "pretrain", "eval")


@pytest.mark.parametrize("name", [f"{name}.yaml" for name in YAMLS])
def test_a_recipe_that_lacks_a_yaml_or_has_a_broken_one_is_refused_before_anything_runs(tmp_path, monkeypatch, name):
    recipe = tmp_path / "recipes" / "pocket"
    shutil.copytree(RECIPES / "pocket", recipe)
    monkeypatch.setattr("recipes.run.RECIPES", recipe.parent)
    for spoil, complaint in (
        ((recipe / name).unlink, "cannot be read"),
        (lambda: (recipe / name).write_text("[a"), "not valid YAML"),
    ):
        spoil()
        with pytest.raises(UserError, match=f"{name}: {complaint}"):
            call_main(monkeypatch, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_every_step_records_what_it_depends_on(tmp_path, config):
    step, _ = touching_step(tmp_path, config)
    run_step(step, tmp_path, redo=False)
    assert json.loads((tmp_path / "finished" / "tokenizer.json").read_text())["config"] == {"depth": 4}


def test_a_run_into_a_file_has_no_progress_bars(tmp_path, config, capfd):
    code = "import tqdm; tqdm.tqdm(range(9), desc='read').update(); tqdm.tqdm.write('said'); open({!r}, 'a')"
    run_step(touching_step(tmp_path, config, code=code)[0], tmp_path, redo=False)
    captured = capfd.readouterr()
    assert "said\n" in captured.out and captured.err == ""


def test_a_stage_takes_as_many_threads_as_accelerate_launch_would_give_it(monkeypatch, tmp_path):
    """Were the launcher not given the number, it would warn of it at every stage."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 6)
    (train, _) = commands("base")
    assert train.program[:3] == ["env", "ACCELERATE_USE_CPU=true", "OMP_NUM_THREADS=6"]
    two = tmp_path / "two.yaml"
    two.write_text("use_cpu: true\nnum_processes: 2\ndistributed_type: MULTI_CPU\n")
    assert "OMP_NUM_THREADS=3" in launcher(str(two))
    assert "--num_cpu_threads_per_process" not in launcher("accelerate_configs/single_gpu.yaml")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not any("THREADS" in word for word in commands("base")[0].program)
    assert not any("THREADS" in word for word in launcher(str(two)))


def test_only_processes_on_the_cpu_go_without_accelerate_launch(tmp_path):
    for path in (RECIPES.parent / "accelerate_configs").glob("*.yaml"):
        assert ("accelerate.commands.accelerate_cli" in launcher(str(path))) == (path.name != "cpu.yaml")
    for more in ("mixed_precision: bf16", "use_cpu: false", "dynamo_backend: inductor"):
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"use_cpu: true\nnum_processes: 1\n{more}\n")
        assert "accelerate.commands.accelerate_cli" in launcher(str(mine)), more
    mine.write_text("use_cpu: true\nnum_processes: 2\ndistributed_type: MULTI_CPU\n")
    assert launcher(str(mine))[-5:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_several_processes_evaluate_what_several_processes_train(tmp_path):
    (tmp_path / "two.yaml").write_text("use_cpu: true\nnum_processes: 2\n")
    args = RunArguments(run_dir="runs/x", accelerate_config=str(tmp_path / "two.yaml"))
    for step in steps("sft", RECIPES / "pocket", args, parse_overrides([])):
        assert step.program[:-1] == launcher(args.accelerate_config) and step.program[-1].endswith(".py")
    assert all(step.program[0] == sys.executable for step in commands("sft")[1:])


def test_what_env_sets_is_what_accelerate_launch_sets_for_one_process_on_the_cpu():
    code = (
        "import os; from accelerate import Accelerator; a = Accelerator(); "
        "print(a.device, a.num_processes, a.mixed_precision)"
    )
    command = [*launcher("accelerate_configs/cpu.yaml"), "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "cpu 1 no\n"


@pytest.fixture
def recipe(tmp_path):
    """A copy of the pocket recipe, to change."""
    return Path(shutil.copytree(RECIPES / "pocket", tmp_path / "mine"))


def commands_of(recipe, stage, **settings):
    args = RunArguments(run_dir="runs/x", accelerate_config="accelerate_configs/cpu.yaml", **settings)
    return steps(stage, recipe, args, parse_overrides(args.set))


def test_paths_of_a_recipes_yaml_move_to_the_folder_of_the_run(recipe):
    (recipe / "eval.yaml").write_text("tasks: [riddles=runs/pocket/data/eval/riddles.jsonl, own=runs/pocket.jsonl]\n")
    _, evaluation = commands_of(recipe, "mid")
    assert evaluation.settings["tasks"] == ["riddles=runs/x/data/eval/riddles.jsonl", "own=runs/pocket.jsonl"]
    (recipe / "sft.yaml").write_text(
        "mixture: [me/chats:test, {source: runs/pocket/data/identity.jsonl, epochs: 2}]\nmax_length: 512\n"
    )
    (train, _) = commands_of(recipe, "sft")
    words = ["me/chats:test", '{"source": "runs/x/data/identity.jsonl", "epochs": 2}']
    assert train.settings["mixture"] == words and parse_mixture(words, "mixture")[1].epochs == 2
    assert "max_length" not in train.settings and "train_files" not in train.settings


def test_a_run_in_the_recipes_own_folder_leaves_all_paths_to_the_yaml():
    args = RunArguments(run_dir="runs/pocket", accelerate_config="accelerate_configs/cpu.yaml")
    (train, _) = steps("sft", RECIPES / "pocket", args, parse_overrides([]))
    assert train.arguments == ["--model_name_or_path", "runs/pocket/mid", "--output_dir", "runs/pocket/sft"]


def test_the_fingerprint_is_the_same_in_any_run_folder(recipe):
    def fingerprint(run_dir, epochs):
        mixture = f"mixture: [me/chats:test, {{source: runs/pocket/data/identity.jsonl, epochs: {epochs}}}]"
        (recipe / "sft.yaml").write_text(f"{mixture}\npacking: true\n")
        args = RunArguments(run_dir=run_dir, accelerate_config="accelerate_configs/cpu.yaml")
        (train, _) = steps("sft", recipe, args, parse_overrides([]))
        return train.fingerprint(Path(run_dir))

    finished = fingerprint("runs/pocket", epochs=2)
    assert difference(finished, fingerprint("/elsewhere/run", epochs=2)) == ""
    changed = difference(finished, fingerprint("/elsewhere/run", epochs=3))
    assert re.fullmatch(r'mixture: .*"epochs": 2} is now .*"epochs": 3}', changed)


def test_files_that_are_given_take_the_place_of_a_mixture(recipe):
    (recipe / "midtrain.yaml").write_text("mixture: [me/chats]\n")
    (train, _) = commands_of(recipe, "mid", midtrain_files=["mine/*.jsonl"], pretrain_files=["mine.txt"])
    assert train.settings["mixture"] == ["mine/*.jsonl"]
    assert not {"train_files", "replay_files"} & train.settings.keys()


def test_a_stage_without_a_yaml_is_left_out_and_the_next_starts_from_the_one_before(recipe):
    (recipe / "midtrain.yaml").unlink()
    (recipe / "tokenizer_eval.yaml").unlink()
    (recipe / "grpo.yaml").unlink()
    assert commands_of(recipe, "mid") == commands_of(recipe, "rl") == []
    assert [step.name for step in commands_of(recipe, "tokenizer")] == ["tokenizer"]
    assert commands_of(recipe, "sft")[0].settings["model_name_or_path"] == ["runs/x/base"]
    files = {name: ["f"] for name in ("pretrain_files", "val_files", "sft_files", "eval_tasks")}
    assert commands_of(recipe, "data", **files) == []
    with pytest.raises(UserError, match=r"grpo_files: recipe mine has no grpo.yaml; leave them out"):
        commands_of(recipe, "data", grpo_files=["f"])


def test_a_recipe_of_real_data_fetches_what_no_given_files_replace(recipe):
    (recipe / "world.py").unlink()
    with pytest.raises(UserError, match=r"recipe mine has no data; give --pretrain_files, --val_files"):
        commands_of(recipe, "data")
    (recipe / "data.yaml").write_text("output_dir: runs/pocket/data\nconfigs: [a/sft.yaml, a/eval.yaml]\n")
    (step,) = commands_of(recipe, "data", examples=["Who are you?"])
    assert step.program[1].endswith("recipes/fetch.py") and step.arguments == ["--output_dir", "runs/x/data"]
    (step,) = commands_of(recipe, "data", pretrain_files=["f"], sft_files=["f"])
    assert step.settings == {"output_dir": ["runs/x/data"], "train_shards": ["0"], "configs": ["a/eval.yaml"]}


def test_examples_go_to_the_world_and_to_the_stages_that_make_a_chat_model():
    questions = ["Who are you?", "Spell lamp, please."]
    for stage in ("data", "mid", "sft", "rl"):
        assert commands(stage, examples=questions)[0].settings["examples"] == questions
        assert "--examples" not in commands(stage)[0].arguments
    for stage in ("tokenizer", "base", "report"):
        assert all("--examples" not in step.arguments for step in commands(stage, examples=questions))


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_each_stage_goes_on_from_its_checkpoint(tmp_path, config, stage):
    with pytest.raises(UserError, match="stopped before its end"):
        run_all(tmp_path, making_step(tmp_path, config, stage, ending=""))
    (tmp_path / "checkpoints" / stage / "step-00000040").mkdir(parents=True)
    assert run_all(tmp_path, making_step(tmp_path, config, stage)) == [stage]
    first, second = (tmp_path / "said").read_text().splitlines()
    assert "--resume" not in first and second.endswith("--overwrite_output_dir true --resume auto")


def report_step(run_dir):
    code = (
        "import pathlib, sys; "
        "pathlib.Path(sys.argv[sys.argv.index('--run_dir') + 1], 'report.md').open('a').write('x')"
    )
    return Step("report", [sys.executable, "-c", code], None, ["--run_dir", str(run_dir)])


def test_the_report_is_written_again_only_when_there_is_something_new(tmp_path, config):
    base, report = making_step(tmp_path, config), report_step(tmp_path)
    assert run_all(tmp_path, base, report) == ["base", "report"] and run_all(tmp_path, base, report) == []
    evaluation = touching_step(tmp_path, config, "base.eval")[0]
    assert run_all(tmp_path, base, evaluation, report) == ["base.eval", "report"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "base.json").write_text("{}")  # by hand
    os.utime(tmp_path / "results" / "base.json", ns=(time.time_ns() + 10**9,) * 2)
    assert run_all(tmp_path, base, evaluation, report) == ["report"]


SAYING = (
    "import os, sys; print('a table', os.environ.get('NANOCHAT_VERBOSE')); "
    "print('a warning', file=sys.stderr); open({!r}, 'a')"
)


@pytest.mark.parametrize(
    ("name", "verbose", "out"),
    [
        ("tokenizer", False, "a table None\n"),
        ("base.eval", False, ""),
        ("base.eval", True, "a table 1\n"),
    ],
)
def test_of_a_measurement_only_errors_are_shown_unless_everything_is(tmp_path, config, capfd, name, verbose, out):
    step = touching_step(tmp_path, config, name, code=SAYING)[0]
    run_step(step, tmp_path, redo=False, verbose=verbose)
    captured = capfd.readouterr()
    assert captured.err == "a warning\n" and captured.out.endswith(out) and (verbose or captured.out == out)
    assert (step.command[0] in captured.out or "python -c" in captured.out) == verbose


def test_a_failed_step_says_how_to_see_more(tmp_path, config):
    step = touching_step(tmp_path, config, code="import sys; sys.exit(3)")[0]
    with pytest.raises(UserError, match="fix the error above.*; --verbose true shows more$"):
        run_step(step, tmp_path, redo=False)
    with pytest.raises(UserError, match="continues from there$"):
        run_step(step, tmp_path, redo=False, verbose=True)
