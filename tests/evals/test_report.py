import json
import re
from xml.etree import ElementTree

import pytest

from evals.report import code_rows, duration, main, render, terminal_summary, write_report
from evals.reporting.curves import curves, pass_at_k_panels, running_mean
from evals.reporting.run_folder import read_run
from evals.reporting.summary import comparison, summary_rows
from evals.reporting.tokenizer_section import code, draw_compression, shortened, statistics_rows
from evals.reporting.transcript import fenced, transcript
from modeling_nanochat.errors import UserError

SECTIONS = ["Summary", "Curves", "Tokenizer", "Stages", "Settings", "Code", "Sample conversations"]
MACHINE = {"platform": "Linux", "cores": 2, "gpus": [], "peak_memory_mib": 1024}
CALL = [{"type": "function", "function": {"name": "python", "arguments": {"code": "12+7"}}}]
CONVERSATION = [
    {"role": "user", "content": "Mira has 12 plums and gets 7. How many?"},
    {"role": "assistant", "content": "12 + 7 = ", "tool_calls": CALL},
    {"role": "tool", "name": "python", "content": "19"},
    {"role": "assistant", "content": "19 plums.\n#### 19"},
]


TOKENIZER = {
    "tokenizer": "pocket/tokenizer",
    "settings": {"tokenizer": "pocket/tokenizer", "max_bytes": 2000000},
    "seconds": 2.5,
    "vocabularies": [
        {"name": "GPT-2", "entries": 50257, "source": "encoder.json"},
        {"name": "ours", "entries": 1536, "source": "pocket/tokenizer"},
    ],
    "missing": {"GPT-4": "offline"},
    "texts": [
        {
            "name": "news",
            "source": "sample_texts/news.txt",
            "documents": 1,
            "bytes": 1200,
            "words": 200,
            "tokens": {"GPT-2": 300, "ours": 240},
            "bytes_per_token": {"GPT-2": 4.0, "ours": 5.0},
            "tokens_per_word": 1.2,
            "fewer_percent": {"GPT-2": 20.0},
        },
        {
            "name": "val",
            "source": "a.parquet",
            "documents": 12,
            "bytes": 90000,
            "words": 15000,
            "tokens": {"GPT-2": 20000, "ours": 22500},
            "bytes_per_token": {"GPT-2": 4.5, "ours": 4.0},
            "tokens_per_word": 1.5,
            "fewer_percent": {"GPT-2": -12.5},
        },
    ],
    "table": [
        ["text", "bytes", "GPT-2 (50,257)", "ratio", "ours (1,536)", "ratio", "per word", "vs GPT-2"],
        ["news", "1,200", "300", "4.00", "240", "5.00", "1.20", "+20.0 %"],
        ["val", "90,000", "20,000", "4.50", "22,500", "4.00", "1.50", "-12.5 %"],
    ],
    "statistics": {
        "entries": 1536,
        "special_tokens": 9,
        "token_bytes": {"min": 1, "max": 11, "mean": 3.684, "std": 2.058},
        "kinds": {"single bytes": 256, "letters": 1271},
        "longest": [" everything", "a`b"],
        "unreachable": {"tokens": 1, "examples": ["a|b\n"]},
        "used": {"val": 850},
    },
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, content)) + "\n" if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def record(task, value, error, n=100, metric="accuracy", **settings):
    figures = {"task": task, "metric": metric, "value": value, "standard_error": error, "n": n}
    return figures | {"settings": settings, "model": "m"}


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of all stages, in a few lines each."""
    folder = tmp_path / "pocket"
    write(folder / "data" / "world.json", {"seed": 7, "description": "Made-up people. Held out: some facts."})
    write(
        folder / "stages" / "tokenizer.json", {"stage": "tokenizer", "seconds": 3.0, "settings": {"vocab_size": 1024}}
    )
    for number, stage in enumerate(("base", "mid", "sft", "rl")):
        value = "reward" if stage == "rl" else "loss"
        write(
            folder / "logs" / f"{stage}.jsonl",
            [{"step": s, value: 1 / s, "tokens_per_second": 9000} for s in (1, 2, 3)],
        )
        stage_record = {
            "stage": stage,
            "seconds": 60.0 * (number + 1),
            "steps": 3,
            "tokens": 12288,
            "parameters": 1050000,
        }
        extra = {"finished": f"2026-03-01T1{number}:00:00+00:00", "machine": MACHINE, "versions": {"python": "3.11"}}
        write(folder / "stages" / f"{stage}.json", stage_record | extra | {"settings": {"matrix_lr": 0.02}})
        records = [record("text", 1.25 - number / 10, 0.01, 5000, "bits_per_byte")]
        if stage != "base":
            records.append(record("problems", 0.5 + number / 10, 0.04, 200))
        samples = [] if stage == "base" else [{"task": "problems", "correct": True, "messages": CONVERSATION}]
        results = {"model": f"pocket/{stage}", "seconds": 10.0, "records": records, "samples": samples}
        write(folder / "results" / f"{stage}.json", results)
    return folder


def test_the_report_has_every_section_and_its_pictures(run_folder):
    text = write_report(read_run(run_folder)).read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert "**This is a synthetic world, generated by the recipe from seed 7.** Made-up people. Held out" in text
    assert "started: 2026-03-01 09:59 UTC" in text and "wall time: 10 min 43 s" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["report/loss.svg", "report/reward.svg"]
    for picture in pictures:
        assert ElementTree.parse(run_folder / picture).getroot().tag.endswith("svg")


def test_the_summary_has_a_column_per_model_with_n_and_error(run_folder):
    assert summary_rows(read_run(run_folder)) == [
        ["task, metric", "n", "Base", "Mid", "SFT", "RL"],
        ["text, bits per byte", "5,000 bytes", "1.250 ± 0.010", "1.150 ± 0.010", "1.050 ± 0.010", "0.950 ± 0.010"],
        ["problems, accuracy", "200", "-", "60.0 % ± 4.0", "70.0 % ± 4.0", "80.0 % ± 4.0"],
    ]


def test_a_figure_over_another_number_of_examples_says_so(run_folder):
    write(
        run_folder / "results" / "rl.json", {"model": "m", "seconds": 1, "records": [record("problems", 0.9, 0.1, 9)]}
    )
    assert summary_rows(read_run(run_folder))[-1][-1] == "90.0 % ± 10.0 (n=9)"


def test_a_stage_that_learned_nothing_is_marked_and_an_evaluation_noted(run_folder):
    for kind, key in (("stages", "warnings"), ("results", "note")):
        file = run_folder / kind / "rl.json"
        content = json.loads(file.read_text())
        if key == "warnings":
            content[key] = ["no completion ended by itself from step 1 to step 60", "the loss did not fall"]
        else:
            content["records"][1][key] = "the same answer to all 200 questions: 7"
        write(file, content)
    run = read_run(run_folder)
    text = render(run, {})
    assert (
        "\n\n> ⚠ RL: no completion ended by itself from step 1 to step 60\n\n> ⚠ RL: the loss did not fall\n\n" in text
    )
    assert text.index("⚠") < text.index("## Summary")
    assert "\n- RL, problems: the same answer to all 200 questions: 7\n" in text
    printed = terminal_summary(run)
    assert (
        "⚠ RL: the loss did not fall" in printed and "RL, problems: the same answer to all 200 questions: 7" in printed
    )


def test_a_run_that_learned_is_not_marked(run_folder):
    run = read_run(run_folder)
    assert "⚠" not in render(run, {}) + terminal_summary(run)


@pytest.fixture
def evaluated_run(run_folder):
    """The same, with evaluations during SFT and GRPO."""
    sft = [{"step": 0, "validation_loss": 2.5}, {"step": 2, "chat_core": -0.05, "chat_core_standard_error": 0.01}]
    sft += [{"step": 3, "validation_loss": 1.25, "chat_core": 0.1, "chat_core_standard_error": 0.02}]
    rl = [{"step": 0}, {"step": 2}, {"step": 3}]
    for row, share in zip(rl, (0.1, 0.15, 0.2), strict=True):
        for k in (1, 2, 4):
            row |= {f"pass@{k}": k * share, f"pass@{k}_standard_error": 0.03}
    for stage, rows in (("sft", sft), ("rl", rl)):
        path = run_folder / "logs" / f"{stage}.jsonl"
        write(path, [*map(json.loads, path.read_text().splitlines()), *rows])
    return run_folder


def test_evaluations_during_training_are_shown_first_and_last(evaluated_run):
    text = write_report(read_run(evaluated_run)).read_text(encoding="utf-8")
    assert "- SFT: loss on held-out conversations 2.500 before the first step, 1.250 after step 3\n" in text
    assert "| SFT: chat core | -5.0 % ± 1.0 (step 2) | 10.0 % ± 2.0 (step 3) |\n" in text
    assert "| RL: pass@1 | 10.0 % ± 3.0 (step 0) | 20.0 % ± 3.0 (step 3) |\n" in text
    assert "| RL: pass@4 | 40.0 % ± 3.0 (step 0) | 80.0 % ± 3.0 (step 3) |\n" in text
    assert "(report/evaluations.svg)" in text
    order = curves(read_run(evaluated_run), "sft", "loss", "chat_core", validation_loss="held out")
    assert [curve.name for curve in order] == ["loss", "chat core", "held out"]
    assert ElementTree.parse(evaluated_run / "report" / "evaluations.svg").getroot().tag.endswith("svg")


def test_pass_at_k_is_drawn_over_steps_and_over_k(evaluated_run):
    over_steps, over_k = pass_at_k_panels(read_run(evaluated_run))
    assert [(curve.name, curve.steps, curve.values) for curve in over_steps.curves] == [
        ("pass@1", [0, 2, 3], [0.1, 0.15, 0.2]),
        ("pass@4", [0, 2, 3], [0.4, 0.6, 0.8]),
    ]
    assert [(curve.name, curve.steps, curve.values, curve.errors) for curve in over_k.curves] == [
        ("step 0", [1, 2, 4], [0.1, 0.2, 0.4], [0.03] * 3),
        ("step 3", [1, 2, 4], [0.2, 0.4, 0.8], [0.03] * 3),
    ]


def test_the_same_run_gives_the_same_report(run_folder):
    run = read_run(run_folder)
    first = [write_report(run).read_bytes()] + [p.read_bytes() for p in sorted((run_folder / "report").iterdir())]
    second = [write_report(run).read_bytes()] + [p.read_bytes() for p in sorted((run_folder / "report").iterdir())]
    assert first == second


def test_missing_stages_are_shown_as_missing(run_folder):
    for stage in ("sft", "rl"):
        for kind in ("stages", "results"):
            (run_folder / kind / f"{stage}.json").unlink()
    text = render(read_run(run_folder), {})
    assert "- missing stages: SFT, RL" in text and "| RL | missing |" in text
    assert "RL against SFT: not both evaluated" in text
    assert "| problems, accuracy | 200 | - | 60.0 % ± 4.0 | - | - |" in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS


def test_the_tokenizer_has_a_section_with_table_picture_and_statistics(run_folder):
    write(run_folder / "results" / "tokenizer.json", TOKENIZER)
    text = write_report(read_run(run_folder)).read_text(encoding="utf-8")
    section = text.partition("## Tokenizer")[2].partition("\n## ")[0]
    assert "| text | bytes | GPT-2 (50,257) | ratio | ours (1,536) | ratio | per word | vs GPT-2 |" in section
    assert "| news | 1,200 | 300 | 4.00 | 240 | 5.00 | 1.20 | +20.0 % |" in section
    assert "- val: 12 documents of a.parquet\n- left out: GPT-4, offline" in section
    assert "| of these letters | 1,271 (83.2 %) |" in section and "| used by val | 850 (55.7 %) |" in section
    assert '`" everything"`, ``"a`b"``' in section and "(report/compression.svg)" in section
    drawn = ElementTree.parse(run_folder / "report" / "compression.svg").getroot()
    assert drawn.tag.endswith("svg")
    assert "| Tokenizer | 3 s | 2 s |" in text and "- max_bytes: 2,000,000" in text
    assert "Not evaluated." not in text and "wall time: 10 min 46 s" in text


def test_the_tokenizers_figures_do_not_mix_with_the_models(run_folder):
    before = summary_rows(read_run(run_folder))
    write(run_folder / "results" / "tokenizer.json", TOKENIZER)
    run = read_run(run_folder)
    assert summary_rows(run) == before and "tokenizer" not in run.results


def test_a_run_without_the_tokenizers_evaluation_says_so(run_folder):
    run = read_run(run_folder)
    assert "## Tokenizer\n\nNot evaluated.\n\n## Stages" in render(run, {})
    assert draw_compression(run, run_folder / "report") == {}


def test_the_tokenizers_evaluation_alone_is_enough(tmp_path):
    write(tmp_path / "results" / "tokenizer.json", TOKENIZER)
    first = write_report(read_run(tmp_path)).read_bytes(), (tmp_path / "report" / "compression.svg").read_bytes()
    second = write_report(read_run(tmp_path)).read_bytes(), (tmp_path / "report" / "compression.svg").read_bytes()
    assert first == second


def test_a_tokenizer_with_nothing_to_compare_with_is_drawn_alone(tmp_path):
    alone = json.loads(json.dumps(TOKENIZER))
    del alone["vocabularies"][0]
    write(tmp_path / "results" / "tokenizer.json", alone)
    assert draw_compression(read_run(tmp_path), tmp_path / "report") == {"compression": "compression.svg"}


def test_the_report_draws_what_the_tokenizers_evaluation_writes(toy_model_folder, tmp_path):
    """The two meet in the record only: neither room imports the other."""
    from tokenizer_train.evaluate import TokenizerEvaluateArguments, evaluate_tokenizer

    record = evaluate_tokenizer(
        TokenizerEvaluateArguments(tokenizer=str(toy_model_folder), baselines=[f"same={toy_model_folder}"])
    )
    write(tmp_path / "results" / "tokenizer.json", record)
    run = read_run(tmp_path)
    assert "| korean | 1,060 |" in write_report(run).read_text(encoding="utf-8")
    assert statistics_rows(run.tokenizer["statistics"])[1] == ["entries", "320"]


def test_one_stage_alone_is_enough(tmp_path):
    write(tmp_path / "stages" / "tokenizer.json", {"stage": "tokenizer", "seconds": 1.0})
    text = write_report(read_run(tmp_path)).read_text(encoding="utf-8")
    assert "No logs." in text and "| Tokenizer | 1 s |" in text and "synthetic" not in text


def test_rl_is_compared_with_sft_by_the_error_of_the_difference():
    old = record("t", 0.60, 0.03)
    assert comparison(old, record("t", 0.70, 0.04)) == (
        "60.0 % ± 3.0 -> 70.0 % ± 4.0, +10.0 points ± 5.0: higher by more than its standard error"
    )
    assert comparison(old, record("t", 0.64, 0.04)).endswith("+4.0 points ± 5.0: within its standard error")
    assert comparison(old, record("t", 0.50, 0.04)).endswith(
        "-10.0 points ± 5.0: lower by more than its standard error"
    )
    assert comparison(old, record("t", 0.50, None)).endswith("-10.0 points")


def test_the_terminal_shows_table_and_a_conversation_with_its_call(run_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", "--run_dir", str(run_folder), "--print_summary", "true"])
    main()
    printed = capsys.readouterr().out
    assert "problems, accuracy" in printed and "80.0 % ± 4.0" in printed and "  python   12+7" in printed
    assert (run_folder / "report.md").is_file()


def test_a_run_folder_that_cannot_be_written_is_said_in_one_line(run_folder):
    (run_folder / "report").write_text("")
    with pytest.raises(UserError, match="report.md cannot be written"):
        write_report(read_run(run_folder))


def test_a_run_without_evaluation_can_be_printed(tmp_path):
    write(tmp_path / "stages" / "base.json", {"stage": "base", "seconds": 1.0})
    assert "Base" in terminal_summary(read_run(tmp_path))


def test_a_conversation_shows_calls_and_results():
    assert transcript(CONVERSATION) == (
        "user       Mira has 12 plums and gets 7. How many?\n"
        "assistant  12 + 7 =\n"
        "  python   12+7\n"
        "  result   19\n"
        "assistant  19 plums.\n"
        "           #### 19"
    )
    assert "(no reply" in transcript(CONVERSATION[:1])
    assert fenced("a ``` b").startswith("````text\n")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (None, None, "holds no stages/"),
        ("stages/base.json", "{", "base.json: not valid JSON"),
        ("stages/base.json", "[]", "base.json: lacks"),
        ("results/base.json", "{}", "base.json: lacks model, seconds, records"),
        (
            "results/tokenizer.json",
            '{"seconds": 1}',
            "tokenizer.json: lacks settings, vocabularies, missing, texts, table, statistics",
        ),
        ("logs/base.jsonl", "{", "base.jsonl:1"),
    ],
)
def test_an_empty_or_broken_run_folder_is_refused(tmp_path, name, content, complaint):
    if name:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=complaint) as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "absent")


def test_lines_of_code_are_counted_by_folder_where_there_is_no_git(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("x = 1\ny = 2\n", encoding="utf-8")
    assert code_rows(tmp_path) == [["folder", "files", "lines"], ["package", "1", "2"], ["all", "1", "2"]]


def test_small_helpers():
    assert [duration(s) for s in (3.2, 200, 3700)] == ["3 s", "3 min 20 s", "1 h 1 min"]
    assert running_mean([1, 3, 5], 2) == [1, 2, 4]
    assert shortened("a, b") == "a, b" and shortened("a, b, c, d") == "a and 3 more files"
    assert code('x"\n') == '`"x\\"\\n"`'
