import json
import sys

import pytest

from modeling_nanochat.errors import UserError
from recipes.run import (
    RECIPES,
    RunArguments,
    Step,
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
    with pytest.raises(UserError, match="300 became 400"):
        run_step(changed, tmp_path, redo=False)
    assert path.read_text() == "x"


def test_redoing_a_stage_forgets_what_was_made_from_it(tmp_path, config):
    for name in ("tokenizer", "base", "base.eval", "mid"):
        run_step(touching_step(tmp_path, config, name)[0], tmp_path, redo=False)
    run_step(touching_step(tmp_path, config, "base")[0], tmp_path, redo=True)
    assert {path.stem for path in (tmp_path / "finished").iterdir()} == {"tokenizer", "base"}


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
