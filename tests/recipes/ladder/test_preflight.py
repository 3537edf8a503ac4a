"""What any stage of a run would refuse is refused before the first one runs."""

import gzip
import json
import sys

import pytest
from datasets import Dataset

from evals.tasks.humaneval import HumanEvalQuestion
from modeling_nanochat.chat import python_tool
from modeling_nanochat.errors import UserError
from recipes.ladder.arguments import LADDER, RunArguments, parse_overrides
from recipes.ladder.commands import RECIPES, steps
from recipes.ladder.preflight import check_steps
from recipes.run import main

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
PROBLEM = {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
ALPACA = {"instruction": "Greet me.", "output": "Hello."}


@pytest.fixture
def files(tmp_path):
    texts = {
        "chats.jsonl": json.dumps(CHAT),
        "problems.jsonl": json.dumps(PROBLEM),
        "alpaca.jsonl": json.dumps(ALPACA),
        "prose.jsonl": "It was a dark night.",
        "text.jsonl": json.dumps({"text": "It was a dark night."}),
        "prose.txt": "It was a dark night.",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA, ALPACA], indent=1))
    (tmp_path / "chats.json.gz").write_bytes(gzip.compress(json.dumps([CHAT]).encode()))
    Dataset.from_list([CHAT]).to_parquet(tmp_path / "chats" / "data" / "test.parquet")
    Dataset.from_list([{"text": "It was a dark night."}]).to_parquet(tmp_path / "corpus" / "train.parquet")
    (tmp_path / "latin.txt").write_bytes("Zwölf Boxkämpfer.".encode("latin-1"))
    (tmp_path / "table.parquet").write_bytes(b"PAR1 but no more")
    return tmp_path


def check(folder, *words, **files):
    """Check a whole run of the pocket recipe, with `files` as its files and `words` as `--set`."""
    given = {name: [entry.replace("@", f"{folder}/") for entry in entries] for name, entries in files.items()}
    args = RunArguments(
        run_dir=str(folder / "run"),
        accelerate_config="accelerate_configs/cpu.yaml",
        set=[word.replace("@", f"{folder}/") for word in words],
        **given,
    )
    overrides = parse_overrides(args.set)
    check_steps(
        [step for stage in LADDER for step in steps(stage, RECIPES / "pocket", args, overrides)],
        args.accelerate_config,
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"sft_files": ["@problems.jsonl"], "midtrain_files": ["@*chats.jsonl", "@problems.jsonl"]},
        {"grpo_files": ["@problems.jsonl"] * 16, "eval_tasks": ["gsm8k=@problems.jsonl"]},
        {"val_files": ["@prose.txt", "@text.jsonl"], "pretrain_files": ["@corpus:train"]},
        {"midtrain_files": ["@chats.json.gz"], "sft_files": ["@chats:test"]},
        {"sft_files": ["@run/data:sft:train"]},  # will be there
    ],
)
def test_what_the_stages_take_passes(files, given):
    check(files, **given)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"midtrain_files": ["@alpaca.jsonl"]}, "mid: .*alpaca.jsonl:1: no `messages`"),
        ({"sft_files": ["@prose.jsonl"]}, "sft: .*prose.jsonl:1: not valid JSON"),
        ({"sft_files": ["me/chats"]}, "sft: me/chats: no local file or folder, and HF_HUB_OFFLINE"),
        ({"sft_files": ["@alpaca.json"]}, "sft: .*alpaca.json, record 1: no `messages`"),
        ({"sft_files": ["@prose.txt"]}, "sft: .*prose.txt is text without fields"),
        ({"midtrain_files": ["@chats"]}, "mid: .*chats: no split 'train', only test"),
        ({"midtrain_files": ["@corpus"]}, "mid: .*train.parquet, row 1: no `messages`"),
        ({"grpo_files": ["@chats.jsonl"]}, "rl: .*chats.jsonl:1: not a record of"),
        ({"grpo_files": ["me/problems"]}, "rl: .*me/problems: no local file or folder, and HF_HUB_OFFLINE"),
        ({"grpo_files": ["@nowhere.jsonl"]}, "rl: .*nowhere.jsonl"),
        ({"eval_tasks": ["chats=@chats.jsonl"]}, "base.eval: .*chats.jsonl:1: not a record of"),
        ({"eval_tasks": ["a=me/problems"]}, "base.eval: .*me/problems: no local file or folder, and HF_HUB_OFFLINE"),
        ({"eval_tasks": ["a=@problems.jsonl", "a=@problems.jsonl"]}, "base.eval: .*occurs twice"),
        ({"pretrain_files": ["@prose.jsonl"]}, "base: .*prose.jsonl:1: not valid JSON"),
        ({"pretrain_files": ["@chats.jsonl"]}, "base: .*chats.jsonl: no column 'text'"),
        ({"pretrain_files": ["@latin.txt"]}, "base: .*latin.txt: not UTF-8"),
        (
            {"pretrain_files": ["@text.jsonl", "me/corpus"]},
            "base: me/corpus: no local file or folder, and HF_HUB",
        ),
        ({"pretrain_files": ["@chats:test"]}, "base: .*test.parquet: no column 'text', only messages"),
        ({"val_files": ["@table.parquet"]}, "base: .*table.parquet: cannot be read as parquet"),
    ],
)
def test_files_of_the_wrong_kind_are_refused_with_the_stage_that_would_read_them(files, given, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        check(files, **given)
    assert "\n" not in str(error.value)


def test_what_the_data_step_will_provide_passes(files):
    spelling = '{source: simple_spelling, words: "@run/data/words.txt", rows: 9}'
    identity = '{source: "@run/data/identity.jsonl", epochs: 2}'
    check(files, "base.core_dir=@run/data/core", f"mid.validation_mixture=[{spelling}, {identity}]")


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("rl.nonsense=5", "rl: .*nonsense"),
        ("sft.max_length=many", "sft: .*max_length"),
        ("base.architecture=turboo", "base: .*'turboo'.*plain.*turbo"),
        ("base.max_steps=0", "base: .*max_steps is 0"),
        ("mid.training_recipe=curent", "mid: .*'curent'.*current.*classic"),
        ("base.report_to=wandbb", "base: .*'wandbb'"),
        ("sft.learning_rate=0.1", "sft: learning_rate would have no effect"),
        ("sft.max_steps=0", "sft: max_steps 0 trains nothing"),
        ("rl.temperature=0", "rl: temperature must be"),
        ("eval.batch_size=0", "base.eval: batch_size is 0"),
        ("eval.tasks=core=@nowhere,a=@problems.jsonl", "base.eval: .*nowhere: no such folder"),
        ("base.core_dir=@nowhere", "base: .*nowhere: no such folder"),
        ("base.tokenizer=@nowhere", "base: .*nowhere: no tokenizer there"),
        ("mid.model_name_or_path=@nowhere", "mid: .*nowhere: no such folder"),
        ("mid.replay_files=@chats.jsonl", "mid: .*no column 'text'"),
    ],
)
def test_settings_that_a_stage_would_refuse_are_refused(files, word, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        check(files, word)
    assert "\n" not in str(error.value)


def test_of_a_data_set_on_the_hub_the_beginning_is_streamed(files, hub):
    for name in ("corpus", "chats"):
        hub.put(f"me/{name}", files / name, kind="datasets")
    check(files, pretrain_files=["me/corpus"], midtrain_files=["me/chats:test"], sft_files=["me/chats:test"])
    contents = [sent for sent in hub.requests if sent.method == "GET" and sent.path.endswith(".parquet")]
    assert contents and all(sent.range for sent in contents)
    with pytest.raises(UserError, match="sft: me/corpus, row 1: no `messages`"):
        check(files, sft_files=["me/corpus"])


def test_fewer_problems_than_a_step_takes_are_refused(files):
    with pytest.raises(UserError, match="rl: .*1 "):
        check(files, grpo_files=["@problems.jsonl"])


def test_grpo_without_an_interpreter_for_its_tool_is_refused(files, monkeypatch):
    # not the one that runs already
    monkeypatch.setattr(python_tool, "sandbox_pool", python_tool.sandbox_pool.__wrapped__)
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(UserError, match="rl: .*pydantic-monty"):
        check(files)


def test_an_evaluation_whose_answers_cannot_be_graded_here_is_refused(files, monkeypatch):
    def refuse():
        raise UserError("programs cannot be isolated here")

    names = ("prompt", "canonical_solution", "test", "entry_point")
    (files / "programs.jsonl").write_text(json.dumps(dict.fromkeys(names, "f")) + "\n")
    monkeypatch.setattr(HumanEvalQuestion, "check_grading", refuse)
    with pytest.raises(UserError, match=r"mid\.eval: programs cannot be isolated here"):
        check(files, eval_tasks=["humaneval=@programs.jsonl"])


@pytest.mark.parametrize(
    "words", [["--set", "rl.nonsense=5"], ["--grpo_files", "nowhere.jsonl"], ["--accelerate_config", "nowhere.yaml"]]
)
def test_a_refused_run_leaves_nothing_and_has_started_nothing(tmp_path, monkeypatch, capfd, words):
    monkeypatch.setattr(sys, "argv", ["run.py", "pocket", "--run_dir", str(tmp_path / "run"), *words])
    with pytest.raises(UserError, match=words[1].partition("=")[0].rpartition(".")[2]):
        main()
    assert capfd.readouterr().out == "" and [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
