"""Learning curves of several variants: reading of logs, interpolation, table and plot; once as a whole."""

import json
import os
import subprocess
import sys

import pytest
import training

from modeling_nanochat.errors import UserError
from recipes.benchmarks.learning_curves import Curve, LearningCurvesArguments, cost_of, draw, main, read_curve, table

ROOT = training.ROOT


def write_log(run, rows):
    path = run.parent / "logs" / f"{run.name}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(name, values, step=1000):
    return Curve(name, [step * n for n in range(len(values))], [2.0 * n for n in range(len(values))], values)


def test_a_curve_has_the_seconds_of_training_alone(tmp_path):
    rows = [
        {"step": 0, "tokens": 0, "bits_per_byte": 3.0, "seconds": 9},
        {"step": 1, "tokens": 100, "loss": 5.0, "seconds_training": 0.5, "seconds_evaluation": 7},
        {"step": 10, "tokens": 1000, "loss": 4.0, "seconds_training": 0.25},
        {"step": 10, "tokens": 1000, "bits_per_byte": 2.0},
    ]
    write_log(tmp_path / "base", rows)
    found = read_curve("plain", tmp_path / "base")
    assert (found.tokens, found.bits_per_byte) == ([0, 1000], [3.0, 2.0])
    assert found.seconds == pytest.approx([0, 0.5 + 9 * 0.25])


def test_what_a_loss_cost_is_interpolated():
    one = curve("plain", [3.0, 2.0, 1.5])
    assert cost_of(one, 2.5, one.tokens) == 500
    assert cost_of(one, 1.5, one.seconds) == 4.0
    assert cost_of(one, 1.0, one.tokens) is None


def test_the_table_says_who_reached_the_first_ones_end(tmp_path):
    names = ("plain + classic", "plain + current", "turbo + current")
    curves = [curve(n, v) for n, v in zip(names, ([3.0, 2.0, 1.5], [3.0, 1.5, 1.0], [3.0, 2.0, 1.6]), strict=True)]
    args = LearningCurvesArguments(output_dir="", tokenizer="", train_files=[], val_files=[])
    lines = table(curves, args).splitlines()
    assert lines[5].startswith("| plain + current | 1.0000 | 4 | 500 | 1,000 | 2 |")
    assert "not reached" in lines[6]
    draw(curves, tmp_path / "new" / "curves.svg")
    assert "<svg" in (tmp_path / "new" / "curves.svg").read_text()


def test_a_curve_of_other_settings_is_not_taken_for_one_of_these(tmp_path, monkeypatch):
    """Whether a folder is what was asked for is for the training to say: it knows its settings."""
    (tmp_path / "plain-classic" / "base").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: asked.append(command) or subprocess.CompletedProcess(command, 1)
    )
    words = {"output_dir": tmp_path, "tokenizer": "t", "train_files": "a", "val_files": "b", "depth": 6}
    monkeypatch.setattr("sys.argv", ["learning_curves.py", *(f"--{key}={value}" for key, value in words.items())])
    with pytest.raises(UserError, match="plain-classic/base failed"):
        main()
    assert asked[0][asked[0].index("--depth") + 1] == "6"


@pytest.mark.long
def test_the_script_runs(tmp_path):
    world = training.write_world(tmp_path / "world")
    settings = {
        "output_dir": tmp_path / "curves",
        "max_steps": 6,
        "eval_steps": 3,
        "total_batch_size": 256,
        "tokenizer": world / "tokenizer",
        "train_files": world / "train.parquet",
        "val_files": world / "val.parquet",
        "depth": 2,
        "aspect_ratio": 16,
        "head_dim": 16,
        "max_length": 32,
        "per_device_train_batch_size": 4,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "learning_curves.py"), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=training.environment())
    assert done.returncode == 0, done.stderr
    assert os.path.exists(tmp_path / "curves" / "curves.svg") and "turbo + current" in done.stdout
