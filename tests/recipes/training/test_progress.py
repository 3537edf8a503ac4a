"""The one line that moves, and which evaluations are printed."""

import json
from types import SimpleNamespace

import pytest
from transformers import PretrainedConfig

from recipes.training import progress
from recipes.training.progress import LiveLine, ProgressReport, TrainState
from recipes.training.stage import JsonlLogger


@pytest.fixture
def clock(monkeypatch):
    """Call it with the seconds that pass; there is no terminal."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)

    def wait(seconds):
        now[0] += seconds

    return wait


def test_without_a_terminal_a_line_comes_every_half_minute_with_the_time_left(clock, capfd):
    live = LiveLine(total=1_200, done=200)
    for seconds, step in ((10, 210), (21, 231), (9, 240), (60, 700)):
        clock(seconds)
        live.step(step, "loss 0.700")
    live.close()
    captured = capfd.readouterr()
    assert captured.out.splitlines() == [
        "step 231 of 1,200, 16:09 left, loss 0.700",  # 31 steps in 31 s
        "step 700 of 1,200, 01:40 left, loss 0.700",
    ]
    assert captured.err == ""


def test_on_a_terminal_the_bar_is_enough(clock, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    live = LiveLine(total=10, bar=False)
    clock(100)
    assert live.plain_line(5) is None


def test_only_the_main_process_writes(clock, capfd):
    live = LiveLine(total=10, enabled=False)
    clock(100)
    live.step(5, "loss 0.700")
    live.write(["warning: of one process"])
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def report(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "training_flops_per_token", lambda config, length: 1)
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=1, device=SimpleNamespace(type="cpu"), log=lambda *a, **k: None
    )
    plan, args = SimpleNamespace(max_steps=300), SimpleNamespace(max_length=8, logging_steps=10, report_to="none")
    log = JsonlLogger(tmp_path / "base")
    return ProgressReport(
        accelerator, PretrainedConfig(), plan, args, log, progress.StepTimer(), TrainState(), watch=None
    )


def evaluate(report, step):
    report.evaluated(
        TrainState(steps=step), {"bits_per_byte": 3 - step / 100}, [f"{3 - step / 100:.4f} bits per byte"]
    )
    report.evaluated(TrainState(steps=step), {"samples": ["Once", "One day"]}, ["'Once'", "'One day'"])


def test_printed_are_the_last_evaluation_and_one_every_ten_minutes_all_of_them_are_logged(report, clock, capfd):
    for step, seconds in ((0, 0), (100, 30), (150, 601), (200, 30), (300, 30)):
        clock(seconds)
        evaluate(report, step)
    assert capfd.readouterr().out.splitlines() == [
        "step 150: 1.5000 bits per byte (3.0000 before the first step)",
        "step 150: 'Once'",
        "step 300: 0.0000 bits per byte (3.0000 before the first step)",
        "step 300: 'Once'",
    ]
    rows = [json.loads(line) for line in report.log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in (0, 100, 150, 200, 300) for _ in range(2)]
    assert rows[-1]["samples"] == ["Once", "One day"]


def test_verbose_prints_every_evaluation_whole(report, monkeypatch, capfd):
    monkeypatch.setenv("NANOCHAT_VERBOSE", "1")
    evaluate(report, 100)
    assert capfd.readouterr().out.splitlines() == [
        "step 100: 2.0000 bits per byte",
        "step 100: 'Once'",
        "step 100: 'One day'",
    ]


def test_a_restored_train_state_counts_on_where_it_was_saved():
    state = TrainState()
    state.add_step(2.5, tokens=64)
    state.add_step(2.0, tokens=64)
    restored = TrainState(steps=7, loss=9.0)
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert restored == state == TrainState(steps=2, tokens=128, loss=2.0)
    restored.add_step(1.5, tokens=64)
    assert (restored.steps, restored.tokens, restored.loss) == (3, 192, 1.5)
