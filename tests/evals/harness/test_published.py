import json

import pytest
from golden import shared

from evals.harness.published import PUBLISHED, parse_tasks
from evals.tasks import task_files
from evals.tasks.task_files import load_task
from modeling_nanochat.errors import UserError

MMLU = {"question": "Which?", "choices": ["red", "blue"], "answer": 0}
LOCAL = {
    "arc_easy": "arc/ARC-Easy-test.jsonl",
    "arc_challenge": "arc/ARC-Challenge-test.jsonl",
    "mmlu": "mmlu/test.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "humaneval": "humaneval/HumanEval.jsonl",
    "spelling_bee": "words/words_alpha.txt",
}


def test_a_task_is_a_published_name_or_a_name_with_its_source():
    asked = parse_tasks(["core", "gsm8k", "facts=a/b=c.jsonl", "mmlu=me/exams:test", "bits_per_byte"])
    assert asked == {
        "core": None, "gsm8k": None, "facts": "a/b=c.jsonl", "mmlu": "me/exams:test", "bits_per_byte": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["facts="], "'facts=' is not name=source"),
        (["=facts.jsonl"], "'=facts.jsonl' is not name=source"),
        (["data/facts.jsonl"], r"'data/facts.jsonl' is not one of core, arc_easy, .*; write name=source"),
        (["gsm8k", "gsm8k=mine.jsonl"], "a task name occurs twice: gsm8k"),
        (["bits_per_byte=val.parquet"], "bits_per_byte takes no source; give text_files"),
    ],
)
def test_what_is_no_task_is_refused_with_what_to_write(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_tasks(arguments)


@pytest.mark.parametrize("name", LOCAL)
def test_the_published_data_has_records_of_its_kind(name):
    assert load_task(name, str(shared(f"data/{LOCAL[name]}"))).task.name == PUBLISHED[name].kind


def test_a_published_name_reads_its_data_set_on_the_hub(monkeypatch):
    def read(names, what):
        asked.append(names)
        yield "row 1", MMLU

    asked = []
    monkeypatch.setattr(task_files, "read_records", read)
    assert len(load_task("mmlu", None).questions) == 1 and asked == [["cais/mmlu:all:test"]]


def test_without_network_the_error_says_how_to_give_the_data():
    with pytest.raises(UserError, match=r"openai/gsm8k: .*HF_HUB_OFFLINE forbids .* or give gsm8k=FILE") as error:
        load_task("gsm8k", None)
    assert "\n" not in str(error.value)


def test_other_records_under_a_published_name_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(MMLU))
    with pytest.raises(UserError, match="x.jsonl:1: a record of mmlu, but the published task gsm8k"):
        load_task("gsm8k", str(tmp_path / "x.jsonl"))
