import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from modeling_nanochat.errors import UserError
from recipes.benchmarks import ladder_seeds
from recipes.benchmarks.ladder_seeds import (
    LadderSeedsArguments,
    SeedResults,
    figures_rows,
    gained_and_lost,
    main,
    mcnemar_p,
    mean_and_spread,
    paired_rows,
    percent,
    refused,
    run_ladder,
)

FACT = {"question": "Which?", "answer": "red", "rivals": []}
CLOZE = {"query": "The cat sat on the", "choices": ["mat.", "lamp."], "gold": 0}
EVAL = {
    "cloze": [CLOZE] * 2,
    "facts": [FACT] * 3,
    "problems": [{"question": "1 + 1?", "answer": "#### 2"}] * 2,
    "unknown": [FACT | {"answer": "I do not know that"}],
    "shown/identity": [FACT] * 2,
}


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 1, 2 * (1 + 4) / 16),
    ],
)
def test_mcnemar_is_the_two_sided_binomial_of_the_questions_that_changed(gained, lost, p):
    assert mcnemar_p(gained, lost) == pytest.approx(p)


def test_mcnemar_of_many_questions_is_a_number():
    assert 0 < mcnemar_p(900, 100) < 1e-100 and mcnemar_p(3000, 3000) == 1.0


def predictions(*right, task="facts", reply="red"):
    return [{"task": task, "index": i, "right": bool(r), "reply": reply} for i, r in enumerate(right)]


def test_questions_gained_and_lost():
    assert gained_and_lost(predictions(1, 1, 0, 0, 0), predictions(1, 0, 1, 1, 0)) == (2, 1)
    with pytest.raises(UserError, match="not asked the same questions"):
        gained_and_lost(predictions(1, 1), predictions(1))


def test_mean_and_spread_over_seeds():
    assert mean_and_spread([0.9, 1.0, 0.8]) == (pytest.approx(0.9), pytest.approx(0.1))
    assert mean_and_spread([0.5]) == (0.5, None)
    assert (percent([0.98, 0.99]), percent([0.5]), percent([])) == ("98.5 % ± 0.7", "50.0 %", "-")


def record(task, value, n, kind="match", metric="accuracy"):
    return {"task": task, "metric": metric, "value": value, "n": n, "settings": {"kind": kind}}


def two_seeds():
    """Facts 50 and 100 % after SFT; after RL one gained, none lost in seed 0; a refusal in four replies of seed 1."""
    seeds = {}
    for seed, right in ((0, (1, 0)), (1, (1, 1))):
        of_seed = SeedResults(seconds=100 + 20 * seed, peak_memory_mib=1024)
        of_seed.records = {"base": [record("cloze", 0.9, 2, "cloze")], "mid": []}
        for stage, marks in (("sft", right), ("rl", (1, 1))):
            of_seed.records[stage] = [record("facts", sum(marks) / 2, 2), record("unknown", 1.0, 1)]
            of_seed.predictions[stage] = predictions(*marks) + predictions(
                1, task="unknown", reply="I do not know that."
            )
        seeds[seed] = of_seed
    seeds[1].predictions["rl"][1]["reply"] = "I do not know that."
    return seeds


def test_the_table_has_a_row_per_task_and_counts_in_world_refusals_without_the_unknown():
    rows = {row[0]: row[1:] for row in figures_rows(two_seeds(), LadderSeedsArguments("runs"))}
    assert rows["task"] == ["n", "Base", "Mid", "SFT", "RL"]
    assert rows["cloze"] == ["2", "90.0 % ± 0.0", "-", "-", "-"]
    assert rows["facts"] == ["2", "-", "-", "75.0 % ± 35.4", "100.0 % ± 0.0"]
    assert rows["in-world questions refused"] == ["2", "-", "-", "0.0 % ± 0.0", "25.0 % ± 35.4"]
    rows = {row[0]: row for row in figures_rows(two_seeds(), LadderSeedsArguments("runs", in_world_tasks=["unknown"]))}
    assert rows["in-world questions refused"][4:] == ["100.0 % ± 0.0"] * 2
    with pytest.raises(UserError, match="in_world_tasks: no cloze; there are facts, unknown"):
        figures_rows(two_seeds(), LadderSeedsArguments("runs", in_world_tasks=["cloze"]))


def test_rl_is_compared_with_sft_for_each_task_and_seed():
    rows = paired_rows(two_seeds())
    assert rows[1:3] == [
        ["facts", "0", "2", "50.0 %", "100.0 %", "1", "0", "1"],
        ["facts", "1", "2", "100.0 %", "100.0 %", "0", "0", "1"],
    ]
    assert [row[0] for row in rows[3:]] == ["unknown"] * 2


def test_a_reply_with_the_refusal_in_it_is_one():
    rows = predictions(1, reply="Oh. I do not know that. Sorry.") + predictions(1, 1, 1)
    assert refused(rows, "I do not know that") == 0.25


def test_one_seed_goes_to_the_world_and_to_every_training_stage(tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(ladder_seeds.subprocess, "run", run)
    with pytest.raises(UserError, match="seed 7: the ladder stopped with exit code 3"):
        run_ladder(tmp_path / "7", 7, LadderSeedsArguments(str(tmp_path), set=["base.depth=2"]))
    settings = commands[0][commands[0].index("--set") + 1 :]
    assert settings == ["base.depth=2", "data.seed=7", "base.seed=7", "mid.seed=7", "sft.seed=7", "rl.seed=7"]


@pytest.fixture
def finished_ladder(tmp_path, toy_model_folder):
    """A run folder as run.py leaves it, with the same untrained model at every stage."""
    run = tmp_path / "seeds" / "0"
    for name, records in EVAL.items():
        file = run / "data" / "eval" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    for folder in ("stages", "finished"):
        (run / folder).mkdir()
    for stage in ("base", "mid", "sft", "rl"):
        shutil.copytree(toy_model_folder, run / stage)
        machine = {"peak_memory_mib": 512}
        (run / "stages" / f"{stage}.json").write_text(
            json.dumps({"stage": stage, "seconds": 9, "finished": "2026-01-01", "machine": machine})
        )
    for step in ("rl", "report"):
        (run / "finished" / f"{step}.json").write_text(json.dumps({"seconds": 60}))
    return run


def call(monkeypatch, run, *words):
    monkeypatch.setattr(ladder_seeds, "hide_library_bars", lambda: None)
    monkeypatch.setattr(sys, "argv", ["ladder_seeds.py", "--run_dir", str(run.parent), "--seeds", "0", *words])
    main()


def test_a_finished_ladder_is_evaluated_once_and_the_table_written(finished_ladder, monkeypatch, tmp_path):
    run = finished_ladder
    call(monkeypatch, run)
    table = (run.parent / "table.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    rows = {line[0]: line[1:] for line in lines}
    assert {"cloze", "facts", "problems", "unknown", "identity", "in-world questions refused"} <= rows.keys()
    assert rows["in-world questions refused"][0] == "5"  # facts and problems
    assert rows["seconds, evaluation and report included"] == ["120", "120"]
    assert rows["peak memory of a stage, GiB"] == ["0.50", "0.50"]
    sampled = json.loads((run / "evaluation" / "sampled" / "results.json").read_text())["records"]
    assert [(r["task"], r["settings"]["temperature"], r["settings"]["top_k"]) for r in sampled] == [
        ("identity", 0.6, 50)
    ]

    evaluated = []
    real = ladder_seeds.run_evaluation

    def recorded(args):
        evaluated.append(args)
        return real(args)

    monkeypatch.setattr(ladder_seeds, "run_evaluation", recorded)
    call(monkeypatch, run)
    assert not evaluated and (run.parent / "table.md").read_text(encoding="utf-8") == table

    again = run / "stages" / "rl.json"  # trained once more
    again.write_text(again.read_text().replace("2026-01-01", "2026-01-02"))
    (tmp_path / "more.jsonl").write_text(json.dumps(FACT) + "\n")
    call(monkeypatch, run, "--sampled_files", f"more={tmp_path / 'more.jsonl'}")
    assert [(args.model_name_or_path, len(args.tasks)) for args in evaluated] == [
        (str(run / "rl"), 4),
        (str(run / "rl"), 2),
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--recipe", "absent"], "recipe: 'absent' does not exist"),
        (["--seeds", "0", "0"], "seeds: give at least one, without duplicates"),
        (["--refusal", ""], "refusal is empty"),
    ],
)
def test_what_cannot_be_is_reported_before_anything_runs(finished_ladder, monkeypatch, words, complaint):
    monkeypatch.setattr(ladder_seeds, "run_ladder", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match=complaint):
        call(monkeypatch, finished_ladder, *words)
