"""The metrics as someone else loads them: each by its folder alone."""

import math
import shutil
from pathlib import Path

import evaluate
import pytest
from golden import golden_json

import evals.metrics.core.core
from evals.core.score import combine
from evals.core.tasks import CoreTask
from evals.metrics.chat_core.six_tasks import BASELINES, chat_core
from evals.metrics.code_pass.estimate import pass_at_k
from evals.metrics.core.centered import mean_centered
from evals.metrics.paired import paired_difference

FOLDER = Path(evals.metrics.core.core.__file__).parents[1]
METRICS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and not path.name.startswith("__"))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a copy of the metric's folder, with nothing of the repository beside it."""

    def load(name):
        shutil.copytree(FOLDER / name, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        return evaluate.load(str(tmp_path / name), keep_in_memory=True)

    return load


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_loads_alone_and_says_what_it_is(load, name):
    metric = load(name)
    assert metric.description and metric.inputs_description
    for file in (FOLDER / name).glob("*.py"):
        assert "from evals" not in file.read_text(encoding="utf-8") and "modeling_nanochat" not in file.read_text()
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntitle: ")
    for section in ("## Description", "## Inputs", "## Output values", "## Example", "## Citation"):
        assert f"\n{section}\n" in card


@pytest.mark.parametrize("name", METRICS)
def test_the_example_in_the_card_gives_the_output_in_the_card(load, name, capsys):
    load(name)
    code = (FOLDER / name / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(code.replace(f"evals/metrics/{name}", name), {})
    outputs = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
    assert capsys.readouterr().out.splitlines() == outputs


def test_core_of_the_metric_is_core_of_the_evaluation(load):
    grades = [[True] * 30 + [False] * 10, [True, False, False], [False] * 5]
    tasks = [CoreTask(str(b), "multiple_choice", [], 0, " ", b) for b in (0.25, 0.5, 0.0)]
    result = combine(tasks, [(sum(each), len(each)) for each in grades])
    figures = load("core").compute(predictions=grades, references=[task.baseline for task in tasks])
    assert (figures["core"], figures["standard_error"]) == (result.core, result.standard_error)
    assert figures["centered_accuracies"] == [each["centered"] for each in result.tasks.values()]


def test_chat_core_equals_the_golden_one():
    golden = golden_json("misc.json")["chatcore"]
    names = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}
    figures = {names.get(name, name.lower()): (value, 0.01) for name, value in golden["accuracies"].items()}
    assert chat_core(figures) is None
    value, error = chat_core(figures | {"spelling_bee": (1.0, 0.0), "another": (0.5, 0.5)})
    assert value == pytest.approx(golden["with_spellingbee_1"], abs=1e-12)
    assert error == pytest.approx(math.hypot(*[0.01 / 0.75] * 3, 0.01, 0.01) / 6)


def test_chat_core_is_the_mean_centered_accuracy_of_its_tasks(load):
    figures = {task: (0.1 * number, 0.01 * number) for number, task in enumerate(BASELINES, start=1)}
    accuracies, errors = zip(*figures.values(), strict=True)
    assert chat_core(figures) == pytest.approx(mean_centered(accuracies, errors, list(BASELINES.values())))
    metric = load("chat_core")
    computed = metric.compute(predictions=accuracies, references=list(figures), standard_errors=errors)
    assert tuple(computed.values()) == chat_core(figures)
    with pytest.raises(ValueError, match="missing: mmlu"):
        metric.compute(predictions=[0.5] * 5, references=[task for task in BASELINES if task != "mmlu"])


def test_letters_are_compared_with_guessing(load):
    figures = load("letter_choice").compute(predictions=list("ABAC"), references=list("ABAA"), choices=[4, 4, 4, 4])
    assert figures == {
        "accuracy": 0.75,
        "standard_error": pytest.approx(0.2165, abs=1e-4),
        "baseline": 0.25,
        "centered_accuracy": pytest.approx(2 / 3),
        "n": 4,
    }


def test_the_metrics_of_answers_agree_with_the_accuracy_in_the_records(load):
    expected = pass_at_k([[True]] * 2 + [[False]])
    letters = load("letter_choice").compute(predictions=list("ABA"), references=list("ABC"))
    numbers = load("exact_answer").compute(
        predictions=["#### 1", "#### 2.0", "#### 1"], references=["#### 1", "#### 2", "#### 3"]
    )
    for figures in (letters, numbers):
        assert (figures["accuracy"], figures["standard_error"]) == pytest.approx(expected)


def test_replies_are_graded_as_numbers_or_by_the_original_rule(load):
    metric, references = load("exact_answer"), ["... #### 17", "#### 1,000", "#### 3"]
    replies = ["#### 17.", "#### 1000", "three"]
    assert metric.compute(predictions=replies, references=references)["accuracy"] == pytest.approx(2 / 3)
    figures = metric.compute(predictions=replies, references=references, grading="original")
    assert figures["accuracy"] == figures["unanswered"] == pytest.approx(1 / 3) and figures["n"] == 3
    with pytest.raises(ValueError, match="reference 1 has no '#### <number>': 'seven'"):
        metric.compute(predictions=replies[:2], references=["#### 1", "seven"])


def test_outcomes_of_programs_give_pass_at_k(load):
    figures = load("code_pass").compute(
        predictions=[["passed", "exit"], ["timeout", "exit"]], references=["passed", "passed"], k=[1, 2]
    )
    assert (figures["pass@1"], figures["pass@2"], figures["n"]) == (0.25, 0.5, 2)


def test_the_difference_of_two_models_on_the_same_questions_has_a_small_error():
    hard, easy = [False] * 50, [True] * 50
    difference, error = paired_difference(hard + easy, [True] * 2 + hard[2:] + easy)
    assert (difference, error) == (pytest.approx(0.02), pytest.approx(0.014))
    assert paired_difference([0.5, 0.25], [0.25, 0.5]) == (0.0, pytest.approx(0.25 / math.sqrt(2)))
    for before, after in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="the same questions"):
            paired_difference(before, after)
