import json
import sys
from pathlib import Path

import datasets
import pytest
from evaluation import TASKS, arguments, write_core, write_lines, write_tasks
from transformers.utils import logging

from evals.evaluate_model import main, run_evaluation, spread
from evals.harness.progress import EvaluationProgress
from evals.harness.published import PUBLISHED
from evals.metrics.chat_core.six_tasks import BASELINES
from evals.reporting.records import format_count, format_value, make_record, summary_line
from evals.reporting.run_folder import read_run
from evals.reporting.summary import summary_rows
from evals.reporting.transcript import transcript
from evals.tasks import table
from evals.tasks.evaluation import evaluate_task, joined, not_finite, same_answer
from evals.tasks.letters import LetterQuestion
from evals.tasks.question import Answers, EvaluatedModel
from evals.tasks.task_files import load_task
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.cli import VERBOSE
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.text.records import read_jsonl
from recipes.training.data.conversations import read_conversations


@pytest.fixture(autouse=True)
def library_bars():
    """As they were: the command hides the bars of datasets and transformers for its whole process."""
    hidden, shown = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    yield
    (datasets.disable_progress_bars if hidden else datasets.enable_progress_bars)()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@pytest.fixture
def files(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def test_every_task_has_a_record_and_the_file_holds_what_is_returned(toy_model_folder, files):
    args = arguments(toy_model_folder, files)
    results = run_evaluation(args)
    assert json.loads(Path(args.output_file).read_text(encoding="utf-8")) == results
    by_task = {record["task"]: record for record in results["records"]}
    assert {task: record["n"] for task, record in by_task.items() if task != "text"} == {
        k: len(v) for k, v in TASKS.items()
    }
    assert by_task["text"]["metric"] == "bits_per_byte" and by_task["text"]["value"] > 1
    assert by_task["text"]["n"] == 30 * len("The cat sat on the mat.")
    assert by_task["letters"]["settings"]["baseline"] == 0.25 and by_task["cloze"]["settings"]["baseline"] == 0.5
    assert all(record["model"] == str(toy_model_folder) for record in results["records"])


def test_samples_come_from_every_generative_task_and_end_with_the_greeting(toy_model_folder, files):
    samples = run_evaluation(arguments(toy_model_folder, files, num_samples=3))["samples"]
    assert [sample.get("task") for sample in samples] == ["problems", "problems", "facts", None]
    assert all(sample["messages"][0]["role"] == "user" for sample in samples)
    assert samples[-1]["messages"][0]["content"] == "Who are you?"


def test_a_question_with_a_history_is_asked_after_it(toy_model_folder, files, monkeypatch):
    """The model sees all turns, the samples keep them, and the transcript shows them."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    record = {"question": "Which?", "answer": "red", "rivals": [], "history": turns}
    (files / "later.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    seen = []

    def generate(asked, conversations, progress=None):
        seen.extend(conversations)
        return [[{"role": "assistant", "content": "red"}]] * len(conversations)

    monkeypatch.setattr("evals.tasks.replies.generate_replies", generate)
    args = arguments(toy_model_folder, files, tasks=[f"later={files / 'later.jsonl'}"], text_files=[], max_length=None)
    results = run_evaluation(args)
    question = [*turns, {"role": "user", "content": "Which?"}]
    assert seen[0] == question and results["records"][0]["value"] == 1.0
    assert results["samples"][0]["messages"] == [*question, {"role": "assistant", "content": "red"}]
    lines = transcript(results["samples"][0]["messages"]).splitlines()
    assert [line.split()[1] for line in lines] == ["Hi", "Hello.", "Which?", "red"]
    assert "no reply" in transcript(question)


def test_a_base_model_is_asked_nothing_that_needs_chat_tokens(toy_model_folder, files):
    results = run_evaluation(arguments(toy_model_folder, files, base_model=True))
    assert {record["task"] for record in results["records"]} == {"text", "cloze"}
    assert results["samples"] == []


@pytest.fixture
def core_dir(tmp_path):
    return write_core(tmp_path / "core")


def test_core_has_a_record_and_so_has_each_of_its_tasks(toy_model_folder, files, core_dir):
    only_core = {"tasks": [f"core={core_dir}"], "text_files": [], "max_length": None, "base_model": True}
    only_core["output_predictions"] = str(files / "predictions.jsonl")
    args = arguments(toy_model_folder, files, core_max_per_task=3, **only_core)
    core, zero, two = run_evaluation(args)["records"]
    assert (core["task"], core["metric"], core["n"]) == ("core", "centered_accuracy", 6)
    assert core["settings"] == {"tasks": 2, "max_per_task": 3, "max_length": 256}
    assert (zero["task"], two["task"]) == ("core_mats_0", "core_mats_2")
    assert two["settings"] == {"shots": 2, "baseline": 0.5, "max_per_task": 3, "max_length": 256} and two["n"] == 3
    assert core["value"] == pytest.approx(sum((record["value"] - 0.5) / 0.5 for record in (zero, two)) / 2)
    rows = [row for _, row in read_jsonl(args.output_predictions)]
    for record in (zero, two):
        of_task = [row["right"] for row in rows if row["task"] == record["task"]]
        assert len(of_task) == 3 and sum(of_task) / 3 == pytest.approx(record["value"])


@pytest.mark.parametrize(
    ("limits", "counts"), [({}, (2, 2)), ({"core_max_per_task": 3}, (2, 3)), ({"core_max_per_task": -1}, (2, 4))]
)
def test_max_examples_limits_every_task_and_core_unless_it_has_a_limit_of_its_own(
    toy_model_folder, files, core_dir, limits, counts
):
    only = {"tasks": [f"cloze={files / 'cloze.jsonl'}", f"core={core_dir}"], "base_model": True}
    results = run_evaluation(arguments(toy_model_folder, files, max_examples=2, **only, **limits))
    found = {record["task"]: record["n"] for record in results["records"]}
    assert (found["cloze"], found["core_mats_0"]) == counts


def test_max_examples_does_not_matter_where_there_are_no_tasks(toy_model_folder, files):
    """A ladder sets it for all stages, and a base model may be measured on text only."""
    (record,) = run_evaluation(arguments(toy_model_folder, files, tasks=[], base_model=True, max_examples=2))[
        "records"
    ]
    assert record["task"] == "text" and record["n"] == 30 * len("The cat sat on the mat.")


def test_the_report_shows_core(toy_model_folder, files, core_dir):
    output_file = str(files / "results" / "base.json")
    args = arguments(toy_model_folder, files, output_file=output_file, base_model=True)
    args.tasks.append(f"core={core_dir}")
    value = next(r["value"] for r in run_evaluation(args)["records"] if r["task"] == "core")
    rows = {row[0]: row for row in summary_rows(read_run(files))}
    assert rows["core, centered accuracy"][1] == "8"
    assert rows["core, centered accuracy"][2].startswith(f"{100 * value:.1f} %")
    assert "core mats 2, accuracy (guessing 50 %)" in rows


@pytest.fixture
def chat_core_files(files):
    """A few records of each of the six tasks, under their published names."""
    choices = {"text": ["red", "blue"], "label": ["1", "2"]}
    arc = [{"question": "Which?", "choices": choices, "answerKey": "2"}] * 2
    write_lines(files / "arc_easy.jsonl", arc)
    write_lines(files / "arc_challenge.jsonl", arc)
    write_lines(files / "mmlu.jsonl", TASKS["letters"])
    write_lines(files / "gsm8k.jsonl", TASKS["problems"])
    program = {
        "prompt": "def f():\n",
        "canonical_solution": "    return 1",
        "test": "def check(f):\n    assert f() == 1",
    }
    write_lines(files / "humaneval.jsonl", [program | {"entry_point": "f"}])
    (files / "spelling_bee.txt").write_text("lamp\nred\n")
    return [f"{name}={next(files.glob(f'{name}.*'))}" for name in BASELINES]


def test_chat_core_has_a_record_if_all_its_tasks_were_evaluated(toy_model_folder, files, chat_core_files):
    options = {"text_files": [], "max_length": None, "max_examples": 2}
    results = run_evaluation(arguments(toy_model_folder, files, tasks=chat_core_files, **options))
    *records, chat_core = results["records"]
    assert {record["task"] for record in records} == set(BASELINES) == set(PUBLISHED)
    assert (chat_core["task"], chat_core["metric"], chat_core["n"]) == ("chat_core", "centered_accuracy", 11)
    centered = [(r["value"] - BASELINES[r["task"]]) / (1 - BASELINES[r["task"]]) for r in records]
    assert chat_core["value"] == pytest.approx(sum(centered) / 6)
    some = run_evaluation(arguments(toy_model_folder, files, tasks=chat_core_files[:3], **options))["records"]
    assert {record["task"] for record in some} == set(list(BASELINES)[:3])


def test_answers_are_graded_by_the_originals_rule_if_asked(toy_model_folder, files, monkeypatch):
    monkeypatch.setattr(
        "evals.tasks.replies.generate_replies",
        lambda asked, chats, *_: [[{"role": "assistant", "content": "#### 1.0"}]] * len(chats),
    )
    write_lines(files / "one.jsonl", [{"question": "1?", "answer": "#### 1"}])
    options = {"tasks": [f"one={files / 'one.jsonl'}"], "text_files": [], "max_length": None}
    (record,) = run_evaluation(arguments(toy_model_folder, files, **options))["records"]
    assert record["value"] == 1.0 and record["settings"]["grading"] == "number"
    (record,) = run_evaluation(arguments(toy_model_folder, files, grading="original", **options))["records"]
    assert record["value"] == 0.0 and record["settings"]["grading"] == "original"


def test_several_samples_per_question_give_pass_at_k_and_need_a_temperature(toy_model_folder, files):
    options = {"tasks": [f"problems={files / 'problems.jsonl'}"], "text_files": [], "max_length": None}
    args = arguments(toy_model_folder, files, samples_per_question=3, temperature=1.0, **options)
    args.output_predictions = str(files / "predictions.jsonl")
    assert [record["metric"] for record in run_evaluation(args)["records"]] == ["accuracy", "pass@3"]
    assert len(list(read_jsonl(args.output_predictions))) == 3 * 6
    with pytest.raises(UserError, match="samples_per_question above 1 needs a temperature"):
        run_evaluation(arguments(toy_model_folder, files, samples_per_question=3, **options))


def test_the_same_evaluation_twice_gives_the_same_figures(toy_model_folder, files):
    args = arguments(toy_model_folder, files, max_examples=4, seed=3)
    first, second = run_evaluation(args), run_evaluation(args)
    assert first["records"] == second["records"] and first["samples"] == second["samples"]
    assert {record["n"] for record in first["records"] if record["task"] in ("problems", "letters")} == {4}


def test_half_surrogates_anywhere_in_the_questions_are_evaluated_and_written(toy_model_folder, files):
    half = "\ud83d"
    write_lines(files / "problems.jsonl", [{"question": f"{half} 1 + 1?", "answer": "#### 2"}])
    write_lines(files / "facts.jsonl", [{"question": half, "answer": half, "rivals": [half * 2]}])
    write_lines(files / "letters.jsonl", [{"question": half, "choices": [half, "b"], "answer": 0}])
    write_lines(files / "cloze.jsonl", [{"query": half, "choices": [f"mat{half}", "lamp"], "gold": 0}])
    write_core(files / "core")
    write_lines(files / "core" / "cloze.jsonl", [{"query": half, "choices": ["b", f"c{half}"], "gold": 0}] * 3)
    args = arguments(toy_model_folder, files, output_predictions=str(files / "predictions.jsonl"))
    args.tasks.append(f"core={files / 'core'}")
    results = run_evaluation(args)
    assert len(results["records"]) == 8
    assert results["samples"][0]["messages"][0]["content"] == "\ufffd 1 + 1?"


def test_a_question_longer_than_the_context_counts_as_wrong(toy_model_folder, files):
    long = {"question": "word " * 400, "answer": "#### 1"}
    (files / "long.jsonl").write_text(json.dumps(long) + "\n", encoding="utf-8")
    args = arguments(toy_model_folder, files, tasks=[f"long={files / 'long.jsonl'}"], text_files=[], max_length=None)
    (record,) = run_evaluation(args)["records"]
    assert (record["value"], record["n"], record["settings"]["questions_beyond_context"]) == (0.0, 1, 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tasks": [], "text_files": []}, "nothing to evaluate"),
        ({"tasks": ["facts=absent.jsonl"]}, "no file matches 'absent.jsonl'"),
        ({"text_files": ["absent.parquet"]}, "no file matches 'absent.parquet'"),
        ({"tasks": ["core=absent"]}, "absent: no such folder"),
        ({"core_max_per_task": 0}, "core_max_per_task is 0"),
        ({"core_max_per_task": 5}, "core_max_per_task has no effect without the task core"),
        ({"text_files": []}, "max_length has no effect without text_files"),
        ({"tasks": [], "output_predictions": "p"}, "output_predictions has no effect without tasks"),
        ({"top_k": 50}, "top_k has no effect without temperature"),
        ({"temperature": -1.0}, "temperature must be a number from 0 to 2"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be"),
        ({"seed": -1}, "seed must be"),
        ({"num_samples": -1}, "num_samples is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"model_name_or_path": "./absent"}, "no such folder"),
    ],
)
def test_what_is_wrong_is_reported_in_one_line_and_nothing_is_written(toy_model_folder, files, changes, complaint):
    args = arguments(toy_model_folder, files, **changes)
    with pytest.raises(UserError, match=complaint) as error:
        run_evaluation(args)
    assert "\n" not in str(error.value) and not Path(args.output_file).exists()


def test_a_base_model_with_nothing_but_chat_tasks_is_refused(toy_model_folder, files):
    chat_tasks = [f"{name}={files / name}.jsonl" for name in ("problems", "facts", "letters")]
    args = arguments(toy_model_folder, files, base_model=True, tasks=chat_tasks, text_files=[], max_length=None)
    with pytest.raises(UserError, match="nothing to evaluate: problems, facts, letters need chat tokens"):
        run_evaluation(args)
    assert not Path(args.output_file).exists()


@pytest.mark.parametrize(
    ("answers", "references", "note"),
    [
        (["B"] * 8, list("ABCDABCD"), "the same answer to all 8 questions: 'B'"),
        (["", ""], ["3", "4"], "the same answer to all 2 questions: none"),
        (["x" * 90] * 2, ["3", "4"], "the same answer to all 2 questions: '" + "x" * 60 + "...'"),
        (["B", "A"], ["A", "A"], None),
        (["A"] * 4, ["A"] * 4, None),
        (["A"], ["B"], None),
    ],
)
def test_the_same_answer_to_different_questions_is_noted(answers, references, note):
    assert same_answer(answers, references) == note


def test_answers_of_several_blocks_are_joined_with_the_sums_of_their_counts(toy_model_folder, files):
    write_lines(files / "facts.jsonl", [TASKS["facts"][0] | {"question": "word " * 400}] * 3 + TASKS["facts"])
    options = {"tasks": [f"facts={files / 'facts.jsonl'}"], "text_files": [], "max_length": None, "batch_size": 1}
    (record,) = run_evaluation(arguments(toy_model_folder, files, **options))["records"]
    assert record["n"] == 6 and record["settings"]["questions_beyond_context"] == 3


def test_logits_that_are_not_finite_are_noted():
    parts = [
        Answers([[""]], [[""]], [""], settings={"shots": 0, "questions_not_finite": count}) for count in (1, 0, 1)
    ]
    answers = joined(parts)
    assert answers.settings == {"shots": 0, "questions_not_finite": 2}
    assert not_finite(answers) == "2 of 3 questions: logits not finite, counted as wrong"
    assert not_finite(parts[1]) is None


def test_a_model_with_one_reply_for_everything_gets_the_note_in_its_records(
    toy_model_folder, files, monkeypatch, capsys
):
    """Of every kind of task; what it answers is shown as a reader would see it."""
    colours = [{"question": "Which?", "answer": colour, "rivals": ["blue"]} for colour in ("red", "green")]
    mats = [{"query": "The cat sat on the", "choices": ["mat.", "lamp."], "gold": gold} for gold in (0, 1)]
    for name, records in (("facts", colours), ("cloze", mats)):
        write_lines(files / f"{name}.jsonl", records)
    reply = [{"role": "assistant", "content": "Hello.\n#### 7"}]
    monkeypatch.setattr("evals.tasks.replies.generate_replies", lambda asked, chats, *_: [reply] * len(chats))
    monkeypatch.setattr("evals.tasks.letters.predict_letters", lambda model, tokenizer, asked, *_: ["C"] * len(asked))
    monkeypatch.setattr(
        "evals.tasks.continuations.predict_choices", lambda model, tokenizer, asked, *_: [1] * len(asked)
    )
    args = arguments(toy_model_folder, files)
    words = [
        f"--{name}={value}"
        for name, value in (("model_name_or_path", args.model_name_or_path), ("output_file", args.output_file))
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *words, "--tasks", *args.tasks])
    main()
    written = json.loads(Path(args.output_file).read_text(encoding="utf-8"))["records"]
    notes = {record["task"]: record["note"].partition(": ")[2] for record in written}
    assert notes == {"problems": "'7'", "facts": "'Hello. #### 7'", "letters": "'C'", "cloze": "'choice 2'"}
    assert "letters: the same answer to all 8 questions: 'C'" in capsys.readouterr().out


class BoolQuestion(LetterQuestion):
    """BoolQ (https://arxiv.org/abs/1905.10044), as a new file in evals/tasks would have it."""

    name = "boolq"
    fields = frozenset({"question", "passage", "answer"})

    @classmethod
    def from_record(cls, record, where):
        return cls(f"{record['passage']}\n{record['question']}?", ("yes", "no"), ("A", "B"), "BA"[record["answer"]])


def test_a_new_task_is_one_class_and_one_line_in_the_table(toy_model_folder, files, monkeypatch):
    """It is evaluated, trained on, and has its figures in the record."""
    monkeypatch.setattr(table, "TASKS", (BoolQuestion, *table.TASKS))
    records = [{"question": f"is {n} odd", "passage": "Of numbers.", "answer": bool(n % 2)} for n in range(6)]
    write_lines(files / "odd.jsonl", records)
    asked = {"tasks": [f"odd={files / 'odd.jsonl'}"], "text_files": [], "max_length": None}
    (record,) = run_evaluation(arguments(toy_model_folder, files, **asked))["records"]
    assert (record["task"], record["n"], record["settings"]["kind"]) == ("odd", 6, "boolq")
    assert record["settings"]["baseline"] == 0.5 and 0 <= record["value"] <= 1
    chats = read_conversations([str(files / "odd.jsonl")])
    assert [chat["messages"][1]["content"] for chat in chats] == ["B", "A"] * 3


def test_two_tasks_of_one_name_are_refused(toy_model_folder, files):
    args = arguments(toy_model_folder, files, tasks=[f"a={files / 'facts.jsonl'}", f"a={files / 'cloze.jsonl'}"])
    with pytest.raises(UserError, match="occurs twice"):
        run_evaluation(args)


def test_every_prediction_is_kept_with_the_reply_and_agrees_with_the_record(toy_model_folder, files):
    args = arguments(toy_model_folder, files, output_predictions=str(files / "predictions.jsonl"))
    records = {record["task"]: record for record in run_evaluation(args)["records"]}
    rows = [row for _, row in read_jsonl(args.output_predictions)]
    assert [(row["task"], row["index"]) for row in rows] == [
        (name, i) for name in TASKS for i in range(len(TASKS[name]))
    ]
    for name in TASKS:
        of_task = [row for row in rows if row["task"] == name]
        assert sum(row["right"] for row in of_task) / len(of_task) == pytest.approx(records[name]["value"])
        assert all(isinstance(row["reply"], str) for row in of_task)
    assert {row["reply"] for row in rows if row["task"] == "letters"} <= set("ABCD")
    right = {row["index"]: row["reply"] for row in rows if row["task"] == "cloze" and row["right"]}
    assert set(right.values()) <= {"choice 1"}


def test_sampled_replies_follow_the_seed_and_the_record_says_how_they_were_sampled(toy_model_folder, files):
    def replies(**changes):
        only = {"tasks": [f"problems={files / 'problems.jsonl'}"], "text_files": [], "max_length": None}
        results = run_evaluation(arguments(toy_model_folder, files, **only, **changes))
        return results["records"][0]["settings"], [sample["messages"] for sample in results["samples"]]

    sampled = {"temperature": 2.0, "top_k": 50}
    settings, first = replies(**sampled)
    assert (settings["temperature"], settings["top_k"]) == (2.0, 50)
    assert replies(**sampled)[1] == first != replies(**sampled, seed=1)[1]
    settings, greedy = replies()
    assert settings["temperature"] == 0 and "top_k" not in settings and greedy != first


def test_several_samples_of_a_question_are_graded_each_and_pass_at_k_has_its_record(
    toy_model_folder, files, monkeypatch
):
    """Of three questions, all of whose replies are the same, two of two samples, one and none are right."""
    contents = iter(["red", "red", "red", "blue", "", "blue"])
    monkeypatch.setattr(
        "evals.tasks.replies.generate_replies",
        lambda asked, chats, *_: [[{"role": "assistant", "content": next(contents)}] for _ in chats],
    )
    model, tokenizer = load_model_and_tokenizer(str(toy_model_folder))
    asked = EvaluatedModel(model, tokenizer, None, SamplingOptions(temperature=1.0), samples=2)
    result = evaluate_task(load_task("facts", str(files / "facts.jsonl")), asked, "m", {})
    accuracy, both = result.records
    assert (accuracy["metric"], accuracy["value"], accuracy["n"]) == ("accuracy", 0.5, 3)
    assert (both["metric"], both["value"]) == ("pass@2", pytest.approx(2 / 3)) and both["settings"]["samples"] == 2
    assert [(row["index"], row["right"], row["reply"]) for row in result.predictions] == [
        (0, True, "red"), (0, True, "red"), (1, True, "red"), (1, False, "blue"), (2, False, ""), (2, False, "blue")
    ]  # fmt: skip
    assert len(result.samples) == 3 and result.samples[1]["correct"]


def test_samples_of_a_question_differ_and_follow_the_seed(toy_model_and_tokenizer, files):
    model, tokenizer = toy_model_and_tokenizer
    task = load_task("problems", str(files / "problems.jsonl"))

    def replies(seed):
        options = SamplingOptions(temperature=1.5)
        asked = EvaluatedModel(model, tokenizer, Engine(model, tokenizer), options, 8, 8, seed, samples=3)
        return [row["reply"] for row in evaluate_task(task, asked, "m", {}).predictions]

    first = replies(seed=1)
    assert len(first) == 6 * 3 and len(set(first)) > 12
    assert replies(seed=1) == first != replies(seed=2)


def test_a_sampled_reply_depends_on_neither_batch_size_nor_number_of_samples(toy_model_and_tokenizer, files):
    model, tokenizer = toy_model_and_tokenizer
    task = load_task("problems", str(files / "problems.jsonl"))

    def replies(batch_size, samples):
        options = SamplingOptions(temperature=1.5, top_k=None)
        asked = EvaluatedModel(model, tokenizer, Engine(model, tokenizer), options, batch_size, 8, samples=samples)
        rows = evaluate_task(task, asked, "m", {}).predictions
        return [[row["reply"] for row in rows if row["index"] == index] for index in range(len(task.questions))]

    expected = replies(batch_size=1, samples=3)
    assert len({reply for samples in expected for reply in samples}) > 12
    for batch_size in (2, 5, 64):
        assert replies(batch_size, samples=3) == expected
    assert replies(batch_size=4, samples=1) == [samples[:1] for samples in expected]


def test_where_there_is_no_terminal_progress_is_a_plain_line_at_intervals(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr("evals.harness.progress.time.monotonic", lambda: next(clock))
    with EvaluationProgress(100) as progress:
        progress.start("facts")
        for count in (10, 40, 1):  # after 10, 40 and 50 seconds
            progress.update(count)
    captured = capsys.readouterr()
    assert captured.err == "facts: 50 of 100 prompts, 00:40 left\n" and not captured.out


def test_the_counted_prompts_are_those_announced(toy_model_folder, files, monkeypatch):
    made = []

    class Recorded(EvaluationProgress):
        def __init__(self, total, quiet):
            super().__init__(total, quiet)
            made.append(self)

    monkeypatch.setattr("evals.evaluate_model.EvaluationProgress", Recorded)
    long = {"question": "word " * 400, "answer": "#### 1"}
    (files / "long.jsonl").write_text(json.dumps(long) + "\n", encoding="utf-8")
    args = arguments(toy_model_folder, files)
    args.tasks.append(f"long={files / 'long.jsonl'}")
    run_evaluation(args)
    (progress,) = made
    assert progress.done == progress.total == 6 + 3 + 8 + 2 * 4 + 1


def test_the_line_of_an_evaluation():
    figures = [("facts", 0.996, 0.002), ("problems", 0.69, 0.03), ("stories", 1.0, 0.0), ("spelling", 0.95, 0.004)]
    records = [make_record(task, "accuracy", value, error, 9, {}, "m") for task, value, error in figures]
    text = make_record("text", "bits_per_byte", 0.31749, 0.01, 9, {}, "m")
    line = "facts 99.6 %, problems 69 % ± 3, stories 100 %, spelling 95 %, text 0.317 bits per byte"
    assert summary_line([text, *records]) == line
    core = [make_record(name, "accuracy", 0.25, None, 9, {}, "m") for name in ("core", "core_copa")]
    assert summary_line(core) == "core 25 %"
    unfinished = [
        make_record(name, "centered_accuracy", float("nan"), None, 9, {}, "m") for name in ("core", "core_arc")
    ]
    assert summary_line(unfinished) == "core not finite"
    assert summary_line([make_record("text", "bits_per_byte", float("inf"), None, 9, {}, "m")]) == "text not finite"


def test_the_script_reads_yaml_and_prints_one_line_or_the_table(toy_model_folder, files, monkeypatch, capsys):
    config = files / "eval.yaml"
    config.write_text(
        f"model_name_or_path: {toy_model_folder}\noutput_file: {files / 'out.json'}\n"
        f"tasks:\n- cloze={files / 'cloze.jsonl'}\nbase_model: true\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", "--config", str(config), "--max_examples", "2"])
    main()
    said, bars = capsys.readouterr()
    assert said.startswith("cloze ") and said.count("\n") == 1 and not bars
    with monkeypatch.context() as environment:  # as run.py asks for it
        environment.setenv(VERBOSE, "1")
        main()
    table = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--verbose", "true"])
    main()
    said = capsys.readouterr().out
    assert (
        said.splitlines()[1:] == table.splitlines()[1:]
        and said.splitlines()[-1].split()[:2] == ["cloze", "accuracy"]
        and said.endswith("  2\n")
    )
    (record,) = json.loads((files / "out.json").read_text(encoding="utf-8"))["records"]
    assert record["settings"]["max_examples"] == 2


def test_a_mistyped_key_of_the_yaml_is_named(files, monkeypatch):
    config = files / "eval.yaml"
    config.write_text("model_name_or_path: x\noutput_file: y\nbatchsize: 3\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", "--config", str(config)])
    with pytest.raises(UserError, match="eval.yaml.*batchsize"):
        main()


def test_the_samples_are_shared_out_over_the_tasks():
    tasks = [[{"i": 1}, {"i": 2}, {"i": 3}], [{"i": 4}], []]
    assert spread(tasks, 5) == [{"i": 1}, {"i": 2}, {"i": 4}]
    assert spread([], 5) == [] and spread(tasks, 0) == []


def test_figures_are_shown_with_error_and_count():
    record = make_record("t", "accuracy", 0.84, 0.0259, 200, {}, "m")
    assert (format_value(record), format_count(record)) == ("84.0 % ± 2.6", "200")
    bits = make_record("t", "bits_per_byte", 1.2345, float("nan"), 52310, {}, "m")
    assert (format_value(bits), format_count(bits)) == ("1.234", "52,310 bytes") and bits["standard_error"] is None
