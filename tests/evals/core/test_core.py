import csv
import json
import math

import pytest
import yaml
from conftest import toy_model, toy_tokenizer
from golden import core_model, golden_json, golden_tokenizer, shared
from hypothesis import given
from hypothesis import strategies as st

import evals.core.score
import evals.scoring
from evals.core.grading import chosen
from evals.core.prompts import block_rows, drawn_examples, fewshot_indices, prompts_of, rows_of
from evals.core.score import core, load_core
from evals.core.tasks import CoreTask
from evals.scoring import Score, Scorer
from evals.token_trees import Row, common_prefix, cropped
from modeling_nanochat.errors import UserError

LABELS = (
    "mc_flags",
    "mc_homes",
    "mc_pets_cropped",
    "schema_give",
    "schema_walk",
    "schema_question",
    "lm_flags",
    "lm_own",
    "lm_mixed_cropped",
)
ENTRY = {
    "label": "flags",
    "dataset": "flags.jsonl",
    "icl_task_type": "multiple_choice",
    "num_fewshot": 2,
    "continuation_delimiter": " ",
    "random_baseline_percent": 25,
}
EXAMPLE = {"query": "The flag is", "choices": ["red", "blue"], "gold": 0}


@pytest.fixture(scope="module")
def golden():
    return {task["label"]: task for task in golden_json("core_eval.json")["tasks"]}


@pytest.fixture(scope="module")
def model():
    return core_model()


@pytest.fixture(scope="module")
def tokenizer():
    return golden_tokenizer()


def as_task(case):
    return CoreTask(
        case["label"],
        case["task_type"],
        case["data"],
        case["num_fewshot"],
        case["continuation_delimiter"],
        0.01 * case["random_baseline"],
    )


def rows_of_case(case, tokenizer):
    examples = drawn_examples(as_task(case), case["max_per_task"])
    return block_rows(as_task(case), tokenizer, examples, range(len(examples)), case["max_seq_len"] or 256)


@pytest.mark.parametrize("label", LABELS)
def test_the_same_examples_are_asked_after_the_same_others_in_the_same_words(golden, label):
    case = golden[label]
    examples = drawn_examples(as_task(case), case["max_per_task"])
    assert examples == [case["data"][i] for i in case["shuffled_order"]][: len(case["examples"])]
    for expected in case["examples"]:
        shots = fewshot_indices(expected["idx"], len(examples), case["num_fewshot"])
        assert shots == expected["fewshot_indices"]
        prompts = prompts_of(as_task(case), examples[expected["idx"]], [examples[i] for i in shots])
        assert prompts == expected["prompts"]


@pytest.mark.parametrize("label", LABELS)
def test_tokens_and_spans_equal_the_golden_ones(golden, tokenizer, label):
    for rows, expected in zip(rows_of_case(golden[label], tokenizer), golden[label]["examples"], strict=True):
        assert [row.ids for row in rows] == expected["token_ids"]
        assert [row.start for row in rows] == expected["start"]
        assert [len(row.ids) for row in rows] == expected["end"]


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("label", LABELS)
def test_losses_predictions_and_choices_equal_the_golden_ones(golden, model, tokenizer, label, batch_size):
    rows = rows_of_case(golden[label], tokenizer)
    scores = Scorer(model, batch_size).scores(rows)
    for of_one, of_this, expected in zip(rows, scores, golden[label]["examples"], strict=True):
        if "mean_losses" in expected:
            losses = [score.loss for score in of_this]
            assert losses == pytest.approx(expected["mean_losses"], abs=1e-4, rel=0, nan_ok=True)
            assert chosen(of_this) == expected["pred"]
        else:
            assert of_this[0].predicted == expected["predicted_tokens"]
            assert of_one[0].target == expected["actual_tokens"]


def test_accuracies_and_the_metric_equal_the_golden_ones(golden, model, tokenizer):
    centered = []
    for case in golden.values():
        result = core(
            model, tokenizer, [as_task(case)], max_per_task=case["max_per_task"], max_length=case["max_seq_len"]
        )
        figures = result.tasks[case["label"]]
        assert figures["accuracy"] == pytest.approx(case["accuracy"], abs=1e-7)
        assert figures["centered"] == pytest.approx(case["centered"], abs=1e-7)
        assert figures["n"] == len(case["examples"])
        centered.append(result.core)
    assert sum(centered) / 9 == pytest.approx(golden_json("core_eval.json")["core_metric"], abs=1e-7)


def test_core_is_the_mean_over_tasks_and_has_a_standard_error(golden, model, tokenizer):
    tasks = [as_task(golden[label]) for label in ("mc_homes", "schema_give")]
    result = core(model, tokenizer, tasks)
    homes, give = result.tasks["mc_homes"], result.tasks["schema_give"]
    assert result.core == pytest.approx((homes["centered"] + give["centered"]) / 2)
    assert homes["standard_error"] == pytest.approx(math.sqrt(0.875 * 0.125 / 8))
    by_hand = math.hypot(homes["standard_error"] / (1 - 0.333), give["standard_error"] / 0.5) / 2
    assert result.standard_error == pytest.approx(by_hand)


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_processes_share_the_examples_out_and_add_up_to_the_same(golden, model, tokenizer, num_processes, monkeypatch):
    monkeypatch.setattr(evals.core.score, "EXAMPLES_PER_BLOCK", 3)
    tasks = [as_task(case) for case in golden.values()]
    alone, shares = core(model, tokenizer, tasks), []

    def run(index, gather):
        options = {"process_index": index, "num_processes": num_processes, "gather": gather}
        return core(model, tokenizer, tasks, **options)

    def keep(grades):
        shares.append(grades)
        return grades

    for index in range(num_processes):
        run(index, keep)
    assert run(0, lambda grades: sum(shares)) == alone
    assert all(share.any() for share in shares)  # seven processes too had something to do


def test_batches_do_not_hang_on_the_number_of_processes(golden, model, tokenizer, monkeypatch):
    monkeypatch.setattr(evals.core.score, "EXAMPLES_PER_BLOCK", 3)
    task, seen = as_task(golden["mc_flags"]), []
    score = evals.scoring.score_trees
    monkeypatch.setattr(evals.scoring, "score_trees", lambda model, trees: seen.append(trees) or score(model, trees))
    core(model, tokenizer, [task])
    alone = seen.copy()
    seen.clear()
    for index in range(2):
        core(model, tokenizer, [task], process_index=index, num_processes=2, gather=lambda grades: grades)
    assert all(batch in alone for batch in seen) and all(batch in seen for batch in alone)


def test_several_processes_need_a_sum(model, tokenizer, golden):
    with pytest.raises(ValueError, match="gather"):
        core(model, tokenizer, [as_task(golden["mc_flags"])], num_processes=2)


def test_an_option_without_tokens_of_its_own_wins_only_in_front():
    nothing, something = Score(math.nan, []), Score(2.0, [1])
    assert chosen([nothing, something]) == 0
    assert chosen([something, nothing]) == 0
    assert chosen([Score(3.0, [1]), nothing, something]) == 2
    assert chosen([something, something]) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_the_common_prefix_is_common_and_the_longest(sequences):
    length = common_prefix(sequences)
    assert all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    longer = [sequence[: length + 1] for sequence in sequences]
    assert min(map(len, sequences)) == length or any(one != longer[0] for one in longer)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_cropping_keeps_the_end_and_the_scored_tokens_that_fit(length, start, max_length):
    ids, start = list(range(length)), min(start, length)
    row = cropped(ids, start, max_length)
    assert row.ids == ids[-max_length:]
    assert row.target == [token for token in ids[start:] if token > length - max_length]  # one token before each


def test_an_answer_joined_to_the_prompt_is_scored_from_the_first_token_that_differs():
    assert rows_of("language_modeling", [[9, 1, 2], [9, 1, 5, 6]], 10) == [Row([9, 1, 5, 6], 2)]


def test_few_shot_examples_are_others_and_as_many_as_there_are():
    assert sorted(fewshot_indices(2, 4, 10)) == [0, 1, 3]
    assert fewshot_indices(0, 1, 10) == [] and fewshot_indices(5, 20, 0) == []


def test_a_model_stays_in_the_mode_it_was_in_even_after_an_error(golden, tokenizer):
    model, task = core_model().train(), as_task(golden["mc_flags"])
    core(model, tokenizer, [task], max_per_task=2)
    assert model.training
    with pytest.raises(AttributeError):
        core(model, None, [task])
    assert model.training
    core(model.eval(), tokenizer, [task], max_per_task=2)
    assert not model.training


def write_folder(folder, entry=None, lines=(EXAMPLE,) * 4):
    folder.mkdir(exist_ok=True)
    (folder / "core.json").write_text(json.dumps({"tasks": [ENTRY | (entry or {})]}), encoding="utf-8")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "flags.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return folder


def write_bundle(folder, entry=None, baselines=(("Eval Task", "#shots", "Random baseline"), ("flags", 2, 25))):
    (folder / "eval_data").mkdir(parents=True)
    listed = {
        "label": "flags", "dataset_uri": "flags.jsonl", "num_fewshot": [2], "icl_task_type": "multiple_choice",
    }  # fmt: skip
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [listed | (entry or {})]}), encoding="utf-8")
    (folder / "eval_data" / "flags.jsonl").write_text((json.dumps(EXAMPLE) + "\n") * 4, encoding="utf-8")
    with open(folder / "eval_meta_data.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(baselines)
    return folder


def test_both_layouts_give_the_same_tasks(tmp_path):
    expected = [CoreTask("flags", "multiple_choice", [EXAMPLE] * 4, 2, " ", 0.25)]
    assert load_core(write_folder(tmp_path / "a")) == load_core(write_bundle(tmp_path / "b")) == expected


def test_a_delimiter_that_is_left_out_is_a_space(tmp_path):
    folder = write_folder(tmp_path)
    entry = {key: value for key, value in ENTRY.items() if key != "continuation_delimiter"}
    (folder / "core.json").write_text(json.dumps({"tasks": [entry]}), encoding="utf-8")
    assert load_core(folder)[0].continuation_delimiter == " "


@pytest.mark.parametrize(
    ("entry", "lines", "complaint"),
    [
        ({"dataset": "absent.jsonl"}, (EXAMPLE,), "absent.jsonl: no such file"),
        ({"dataset": None}, (EXAMPLE,), "core.json: task 1 .flags.: `dataset` must be a str, found None"),
        ({"label": 3}, (EXAMPLE,), "core.json: task 1: `label` must be a str"),
        ({"num_fewshot": "2"}, (EXAMPLE,), "`num_fewshot` must be a int, found '2'"),
        ({"num_fewshot": -1}, (EXAMPLE,), "`num_fewshot` is -1"),
        ({"icl_task_type": "essay"}, (EXAMPLE,), "`icl_task_type` must be one of multiple_choice, .*'essay'"),
        ({"random_baseline_percent": 100}, (EXAMPLE,), "random baseline.*found 100"),
        ({}, (), "flags.jsonl: no examples"),
        ({}, (EXAMPLE, "{"), "flags.jsonl:2: not valid JSON"),
        ({}, (EXAMPLE, {"query": "a", "gold": 0}), "flags.jsonl:2: a multiple_choice example needs `choices`"),
        ({}, (EXAMPLE | {"query": 3},), "flags.jsonl:1: `query` must be a string"),
        ({}, (EXAMPLE | {"choices": ["a"]},), "flags.jsonl:1: `choices` must hold 2"),
        ({}, (EXAMPLE | {"gold": 2},), "flags.jsonl:1: `gold` must be the index"),
        ({"icl_task_type": "schema"}, (EXAMPLE,), "flags.jsonl:1: a schema example needs `continuation`"),
        ({"icl_task_type": "language_modeling"}, ({"context": "a"},), "flags.jsonl:1: .* needs `continuation`"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(tmp_path, entry, lines, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        load_core(write_folder(tmp_path, entry, lines))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "core.json: not valid JSON"),
        ("{}", "core.json: `tasks` must be a list"),
        ('{"tasks": [3]}', "core.json: task 1: expected an object, found int"),
        (json.dumps({"tasks": [ENTRY, ENTRY]}), "core.json: label 'flags' occurs twice"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content, complaint):
    (write_folder(tmp_path) / "core.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        load_core(tmp_path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"baselines": [("Eval Task", "Random baseline"), ("other", 3)]},
            "core.yaml: task 1 .flags.: the random base",
        ),
        ({"baselines": [("Eval Task", "Random baseline"), ("flags", "x")]}, "eval_meta_data.csv:2: needs columns"),
        ({"baselines": [("Task", "Baseline"), ("flags", 3)]}, "eval_meta_data.csv:2: needs columns"),
        ({"entry": {"num_fewshot": []}}, "core.yaml: task 1 .flags.: `num_fewshot` must be"),
        ({"entry": {"dataset_uri": None}}, "core.yaml: task 1 .flags.: `dataset` must be"),
        ({"entry": {"dataset_uri": "absent.jsonl"}}, "eval_data/absent.jsonl: no such file"),
    ],
)
def test_what_is_wrong_with_a_bundle_is_told(tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        load_core(write_bundle(tmp_path / "bundle", **options))


def test_folders_that_are_missing_or_hold_no_table_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_core(tmp_path / "absent")
    with pytest.raises(UserError, match="neither core.json nor core.yaml"):
        load_core(tmp_path)
    (write_bundle(tmp_path / "bundle") / "eval_meta_data.csv").unlink()
    with pytest.raises(UserError, match="eval_meta_data.csv: no such file"):
        load_core(tmp_path / "bundle")
    (tmp_path / "bundle" / "core.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(UserError, match="core.yaml: not valid YAML") as error:
        load_core(tmp_path / "bundle")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def real_tasks():
    return load_core(shared("data/core"))


def test_options_scored_together_get_the_grades_of_one_at_a_time(model, tokenizer, real_tasks):
    alone, together = (core(model, tokenizer, real_tasks, max_per_task=3, batch_size=size) for size in (1, 32))
    assert alone == together and len(alone.right) == 22


def test_options_scored_together_get_the_losses_of_one_at_a_time(model, tokenizer, real_tasks):
    for task in real_tasks:
        examples = drawn_examples(task, 3)
        rows = block_rows(task, tokenizer, examples, range(2), 400)  # beyond the model's context of 256
        alone, together = (Scorer(model, size).scores(rows) for size in (1, 32))
        for of_one, of_both in zip(alone, together, strict=True):
            losses = [[score.loss for score in scores] for scores in (of_one, of_both)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5, nan_ok=True)
            assert [score.predicted for score in of_one] == [score.predicted for score in of_both]


def test_right_says_of_each_drawn_example_whether_it_was_right(golden, model, tokenizer):
    case = golden["mc_homes"]
    result = core(model, tokenizer, [as_task(case)], max_per_task=case["max_per_task"])
    assert result.right == {"mc_homes": [example["correct"] for example in case["examples"]]}
    assert not result.notes


def mc_task(*examples):
    return CoreTask("odd", "multiple_choice", examples, 0, " ", 0.5)


def test_an_option_without_tokens_of_its_own_is_never_right_and_is_noted(model, tokenizer):
    beginning = {"query": "The", "choices": ["cat", "cat sat"], "gold": 0}
    for example in (beginning, beginning | {"choices": ["cat", "cat"]}):
        result = core(model, tokenizer, [mc_task(example)])
        assert result.right == {"odd": [False]}
        assert result.notes == {"odd": ["1 of 1 examples: an option without tokens of its own, which is never right"]}


def test_losses_that_are_not_finite_count_as_wrong_and_are_noted(golden, tokenizer):
    model, tasks = core_model(), [as_task(golden[label]) for label in ("mc_flags", "lm_flags", "schema_give")]
    model.lm_head.weight.data[3] = math.nan
    result = core(model, tokenizer, tasks)
    assert not any(any(right) for right in result.right.values())
    notes = ["8 of 8 examples: a loss that is not finite, counted as wrong"]
    assert result.notes == {task.label: notes for task in tasks}


def test_half_of_a_surrogate_pair_is_read_as_a_replacement_character_and_noted(model, tokenizer):
    half, whole = ({"query": text, "choices": ["a b", "c d"], "gold": 0} for text in ("\ud83d The", "\ufffd The"))
    results = [core(model, tokenizer, [mc_task(example)]) for example in (half, whole)]
    assert results[0].right == results[1].right and not results[1].notes
    assert results[0].notes == {"odd": ["1 of 1 examples: an unpaired surrogate in the text, read as U+FFFD"]}


def test_an_empty_continuation_is_not_right(model, tokenizer):
    task = CoreTask("empty", "language_modeling", [{"context": "The cat", "continuation": ""}], 0, "", 0.0)
    assert core(model, tokenizer, [task]).right == {"empty": [False]}


def test_the_real_tasks_load_and_run_with_prompts_beyond_the_context(real_tasks):
    tasks = real_tasks
    assert len(tasks) == 22 and {task.task_type for task in tasks} == {
        "multiple_choice", "schema", "language_modeling",
    }  # fmt: skip
    tokenizer = toy_tokenizer()
    result = core(toy_model(tokenizer, context=64), tokenizer, tasks, max_per_task=2)
    assert all(figures["n"] == 2 for figures in result.tasks.values()) and -1 < result.core < 1
