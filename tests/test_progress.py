"""Progress where nobody looks at a terminal."""

from recipes import progress
from recipes.progress import ProgressLines


def test_without_a_terminal_a_line_comes_every_half_minute_with_the_time_left(monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 40.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    lines = ProgressLines(total=1_200, done=200)
    assert lines.line(210) is None
    assert lines.line(231) == "step 231 of 1,200, 16:09 left"  # 31 steps in 31 s
    assert lines.line(240) is None
    assert lines.line(700) == "step 700 of 1,200, 01:40 left"


def test_on_a_terminal_the_bar_is_enough(monkeypatch):
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert ProgressLines(total=10).line(5) is None
