import math
import sys

import pytest
from evaluation import write_lines

from evals.compare import compare, main, read_shares
from modeling_nanochat.errors import UserError


def predictions(path, grades, task="facts"):
    write_lines(path, [{"task": task, "index": index, "right": right, "reply": ""} for index, right in grades])
    return str(path)


def test_the_difference_has_its_paired_error(tmp_path, monkeypatch, capsys):
    before = predictions(tmp_path / "a.jsonl", enumerate([True, True, False, False]))
    after = predictions(tmp_path / "b.jsonl", enumerate([True, True, True, False]))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--before", before, "--after", after])
    main()
    error = math.sqrt(3 * 0.25**2 + 0.75**2) / 4  # a quarter: three differences of 0 and one of 1
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split() == ["facts", "4", "50.0", "%", "75.0", "%", "+25.0", "±", f"{100 * error:.1f}"]


def test_several_samples_of_a_question_count_as_their_share(tmp_path):
    rows = [(0, True), (0, False), (1, True), (1, True)]
    assert read_shares(predictions(tmp_path / "a.jsonl", rows)) == {"facts": {0: 0.5, 1: 1.0}}


def test_rows_may_be_in_another_order():
    (_, row) = compare({"facts": {0: 1.0, 1: 0.0}}, {"facts": {1: 0.0, 0: 1.0}})
    assert row[-1] == "+0.0 ± 0.0"


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ({"facts": {0: 1.0}}, {"facts": {1: 1.0}}, "facts: the two models were asked other questions"),
        ({"facts": {0: 1.0}}, {"gsm8k": {0: 1.0}}, "no task in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(before, after, complaint):
    with pytest.raises(UserError, match=complaint):
        compare(before, after)


def test_files_of_something_else_are_refused_with_their_line(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"task": "facts", "index": 0, "right": 1}])
    with pytest.raises(UserError, match=r"a.jsonl:1: needs `task`, `index` and `right`"):
        read_shares(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UserError, match=r"b.jsonl: .*empty"):
        read_shares(str(tmp_path / "b.jsonl"))
