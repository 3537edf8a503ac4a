import json
import math

import pytest
from golden import core_model, golden_json, golden_tokenizer, shared

from evals.scoring import Scorer
from evals.tasks.cloze import ClozeQuestion
from evals.tasks.continuations import continuation_rows, predict_choices
from evals.tasks.gsm8k import to_messages
from evals.tasks.match import has_word
from evals.tasks.question import EvaluatedModel
from evals.tasks.table import question_of
from evals.tasks.task_files import load_task
from modeling_nanochat.errors import UserError

MATCH = {"question": "Which?", "answer": "red", "rivals": ["blue"]}
GSM8K = {"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"}
HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
MMLU = {"question": "Which?", "choices": ["red", "blue"], "answer": 0}
CLOZE = {"query": "The sky is", "choices": ["blue", "square"], "gold": 0}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("file", "kind", "count"),
    [
        ("gsm8k/test", "gsm8k", 660),
        ("mmlu/test", "mmlu", 7032),
        ("mmlu/dev", "mmlu", 285),
        ("arc/ARC-Easy-test", "arc", 1188),
        ("arc/ARC-Challenge-test", "arc", 586),
        ("core/commonsense_reasoning/copa", "cloze", 60),
    ],
)
def test_public_data_sets_load_as_tasks(file, kind, count):
    task = load_task("x", shared(f"data/{file}.jsonl"))
    assert (task.task.name, len(task.questions)) == (kind, count)


def test_a_draw_of_examples_is_repeatable_and_spread_over_the_file(tmp_path):
    path = write(tmp_path / "t.jsonl", *(MATCH | {"question": str(i)} for i in range(100)))
    drawn = [int(question.question) for question in load_task("t", path, 20, seed=1).questions]
    assert drawn == [int(question.question) for question in load_task("t", path, 20, seed=1).questions]
    assert drawn == sorted(drawn) and len(set(drawn)) == 20 and max(drawn) > 50
    assert len(load_task("t", path, 200).questions) == 100


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([], "is empty"),
        (["{"], r":1: not valid JSON"),
        ([MATCH, "", GSM8K], r":3: a record of gsm8k among records of match"),
        ([GSM8K, {"text": "x"}], r":2: not a record of"),
        ([{"text": "x"}], r":1: not a record of cloze, arc, mmlu, match, gsm8k, humaneval; its fields are text"),
        ([{"messages": []}], r":1: not a record of"),
        ([MATCH | {"rivals": "blue"}], r":1: `rivals` must be a list"),
        ([MATCH | {"rivals": [""]}], r":1: `rivals` must be .* none of them empty"),
        ([MATCH | {"answer": ""}], r":1: `answer` must be .* none of them empty"),
        ([MATCH | {"answer": ["red", " "]}], r":1: `answer` must be .* none of them empty"),
        ([MATCH | {"answer": ["red", 2]}], r":1: `answer` must be a string or a list of strings"),
        ([MATCH | {"answer": 2}], r":1: `answer` must be a string or a list of strings"),
        ([MATCH | {"answer": []}], r":1: `answer` is empty"),
        ([MATCH, MATCH | {"history": "Hi"}], r":2, `history`: "),
        ([MATCH | {"history": HISTORY[1:]}], r":1, `history`, message 1: role 'assistant' is out of order"),
        ([GSM8K | {"history": HISTORY[:1]}], r":1: `history` must end with an answer of the assistant"),
        ([GSM8K | {"history": to_messages("2 + 2?", "<<2+2=4>>")[:2]}], r":1: `history` must end with an answer"),
        ([CLOZE | {"history": HISTORY}], r":1: only questions that are answered in words"),
        ([MMLU | {"history": HISTORY}], r":1: only questions that are answered in words"),
        ([CLOZE, CLOZE | {"gold": 2}], r":2: `gold` must be the index"),
        ([CLOZE | {"choices": ["one"]}], r":1: `choices` must hold"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, records, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        load_task("t", write(tmp_path / "t.jsonl", *records))
    assert "t.jsonl" in str(error.value)


def test_whole_words_only():
    assert has_word("It is red.", "red") and has_word("red", "red") and has_word("(Old Mill)", "Old Mill")
    assert has_word("lamp:l,a,m,p.", "l,a,m,p") and has_word("Mira's, red.\nYes", "red") and has_word("-3", "-3")
    assert not has_word("It is Red, or reddish.", "red")
    assert not has_word("c,l,a,m,p", "l,a,m,p") and not has_word("l,a,m,p,s", "l,a,m,p") and not has_word("1.5", "1")
    assert not has_word("médaille", "m") and not has_word("éclair", "clair")


def test_words_of_scripts_without_spaces_are_found_in_running_text():
    assert has_word("他有12个苹果。", "12") and has_word("他有12个苹果。", "苹果") and has_word("小明住在北京", "北京")
    assert (
        has_word("他叫Mira吗", "Mira") and has_word("拼写是学,校。", "学,校") and has_word("ミラは東京に住む", "東京")
    )
    assert not has_word("他有12个苹果。", "2") and not has_word("他有12个苹果。", "橙子")
    assert (
        not has_word("小,学,校", "学,校")
        and not has_word("学,校,长", "学,校")
        and not has_word("他叫Miranda吗", "Mira")
    )


def test_a_match_needs_the_answer_and_no_rival():
    replies = ["It is red.", "It is blue.", "red or blue", "reddish", ""]
    question = question_of(MATCH, "f:1")
    assert [question.extract([{"role": "assistant", "content": reply}]) for reply in replies] == [
        "red",
        "",
        "",
        "",
        "",
    ]
    assert question.reference == "red"


def test_a_match_with_several_answers_needs_all_of_them():
    question = question_of({"question": "A story?", "answer": ["Mira", "kite"], "rivals": ["drum"]}, "f:1")
    replies = ["Mira flew a kite.", "Mira ran.", "A kite flew.", "Mira had a kite and a drum.", "Mira and kites"]
    found = [question.extract([{"role": "assistant", "content": reply}]) for reply in replies]
    assert [answer == question.reference for answer in found] == [True, False, False, False, False]


@pytest.mark.parametrize("record", [MATCH, GSM8K])
def test_a_record_may_have_a_history_with_calls_of_the_tool(tmp_path, record):
    turns = [*HISTORY, *to_messages("2 + 2?", "<<2+2=4>>4")]
    task = load_task("t", write(tmp_path / "t.jsonl", record, record | {"history": []}, record | {"history": turns}))
    assert [question.messages[:-1] for question in task.questions] == [[], [], turns]
    assert task.questions[2].messages[-1] == {"role": "user", "content": record["question"]}


def test_a_word_problem_is_graded_on_what_the_assistant_says_last():
    reply = to_messages("q", "1 + 1 = <<1+1=2>>2\n#### 2")[1:]
    printed = [*to_messages("q", "<<print('#### 2')=#### 2>>")[1:3], {"role": "assistant", "content": "There."}]
    replies = [reply, [{"role": "assistant", "content": "2"}], printed, reply[:2]]
    question = question_of(GSM8K, "f:1")
    assert [question.extract(reply) for reply in replies] == ["2", "", "", ""] and question.reference == "2"


def test_cloze_losses_and_choices_equal_the_golden_ones():
    task = next(task for task in golden_json("core_eval.json")["tasks"] if task["label"] == "mc_flags")
    model, tokenizer = core_model(), golden_tokenizer()
    for example in task["examples"]:
        rows = continuation_rows(tokenizer, example["prompts"])
        assert [ids for ids, _ in rows] == example["token_ids"]
        assert [start for _, start in rows] == example["start"]
        (scores,) = Scorer(model, batch_size=3).scores([rows])
        assert [score.loss for score in scores] == pytest.approx(example["mean_losses"], abs=1e-4)
    shuffled = [ClozeQuestion.from_record(task["data"][i], "f:1") for i in task["shuffled_order"]]
    assert predict_choices(model, tokenizer, shuffled) == [example["pred"] for example in task["examples"]]


def test_a_choice_that_begins_another_is_still_scored():
    rows = continuation_rows(golden_tokenizer(), ["a b", "a b c"])
    (scores,) = Scorer(core_model()).scores([rows])
    assert all(0 < score.loss < 20 for score in scores)


def test_no_choice_is_predicted_if_losses_are_not_finite():
    model, tokenizer = core_model(), golden_tokenizer()
    question = ClozeQuestion("The cat ", ("sat", "ran"), 0)
    assert predict_choices(model, tokenizer, [question]) != [None]
    model.lm_head.weight.data[3] = math.nan
    answers = ClozeQuestion.answer([question], EvaluatedModel(model, tokenizer, None, None))
    assert answers.shown == ["none"] and answers.settings["questions_not_finite"] == 1


def test_prompts_beyond_the_context_keep_their_ends():
    tokenizer = golden_tokenizer()
    rows = continuation_rows(tokenizer, ["a b c d e f g", "a b c d e f g h"], 5)
    whole = continuation_rows(tokenizer, ["a b c d e f g", "a b c d e f g h"])
    assert [row.ids for row in rows] == [row.ids[-5:] for row in whole]
    assert [row.target for row in rows] == [row.target for row in whole]
