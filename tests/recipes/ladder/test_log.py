"""What a run prints around its stages."""

import json

import pytest

from recipes.ladder.arguments import LADDER
from recipes.ladder.log import closing_lines, outcome_lines, title


def figure(task, value, error=0.004, metric="accuracy", n=200):
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "standard_error": error,
        "n": n,
        "settings": {},
        "model": "m",
    }


RECORDS = [
    figure("text", 0.4264, 0.01, "bits_per_byte"),
    figure("facts", 0.984),
    figure("word_problems", 0.69, 0.031) | {"note": "the same answer to all 200 questions: '7'"},
    figure("core", None, None, "centered_accuracy"),
    figure("core_arc", 0.3, 0.1),
]
CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "3+4"}}}
GREETING = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
SUM = {
    "messages": [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "3 + 4 =", "tool_calls": [CALL]},
        {"role": "tool", "name": "python", "content": "7"},
        {"role": "assistant", "content": "7.\n#### 7"},
    ]
}


def test_an_evaluation_is_a_line_with_its_notes_and_a_reply_that_uses_the_tool(tmp_path):
    result = tmp_path / "sft.json"
    result.write_text(json.dumps({"model": "m", "seconds": 1, "records": RECORDS[:3], "samples": [GREETING, SUM]}))
    assert outcome_lines(result) == [
        "evaluation: facts 98 %, word problems 69 % ± 3, text 0.426 bits per byte",
        "  word problems: the same answer to all 200 questions: '7'",
        "  'What is 3 + 4?' → '3 + 4 = 7. #### 7'",
    ]
    result.write_text(json.dumps({"model": "m", "seconds": 1, "records": RECORDS[:1], "samples": []}))
    assert outcome_lines(result) == ["evaluation: text 0.426 bits per byte"]


def test_a_tokenizer_is_a_line_about_the_text_that_it_was_not_trained_on(tmp_path):
    texts = [
        {"name": name, "bytes_per_token": {"GPT-2": 3.9, "ours": ours}}
        for name, ours in (("train", 3.8), ("val", 3.7))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocabularies": [], "texts": texts}))
    (line,) = outcome_lines(tmp_path / "tokenizer.json")
    assert "text val: GPT-2 3.90, ours 3.70" in line


@pytest.mark.parametrize("stage", LADDER)
def test_every_stage_has_a_title(stage):
    assert title(stage).startswith(f"{stage}: ") and title(f"{stage}.eval") == f"{stage}: evaluation"


@pytest.fixture
def run_dir(tmp_path):
    for kind in ("stages", "results", "finished"):
        (tmp_path / kind).mkdir()
    for number, stage in enumerate(("base", "mid", "sft", "rl"), start=1):
        record = {"stage": stage, "seconds": 9, "parameters": 1_000_000, "steps": 10, "tokens": 5_000, "machine": {}}
        (tmp_path / "stages" / f"{stage}.json").write_text(json.dumps(record))
        cost = {"seconds": 10 * number, "peak_memory_mib_so_far": 512 * number}
        for name in (stage, f"{stage}.eval"):
            (tmp_path / "finished" / f"{name}.json").write_text(json.dumps(cost))
    (tmp_path / "results" / "sft.json").write_text(json.dumps({"model": "m", "seconds": 1, "records": RECORDS[:3]}))
    return tmp_path


def test_the_end_says_what_was_trained_what_it_cost_how_good_it_is_where_the_report_is_and_what_to_type(run_dir):
    said = " ".join(" ".join(closing_lines("pocket", run_dir, list(LADDER), 3.2, "make chat")).split())
    assert said == (
        f"trained: pocket in {run_dir}: 1,000,000 parameters on 20,000 tokens in 40 steps "
        "cost: 200 s (base 20, mid 40, sft 60, rl 80), at most 2.0 GiB of memory; this run took 3 s "
        f"quality: facts 98 %, word problems 69 % ± 3 (sft) report: {run_dir}/report.md next: make chat"
    )


def test_a_run_that_ends_early_says_up_to_where(tmp_path):
    lines = closing_lines("pocket", tmp_path, ["data"], 3.2, "the same command without --to")
    assert " ".join(lines).startswith(f"trained: pocket up to data in {tmp_path} cost:") and "report" not in "".join(
        lines
    )
    assert lines[-1] == "next:    the same command without --to"
