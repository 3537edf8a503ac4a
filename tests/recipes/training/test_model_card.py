import copy
import json
import os
import re
import subprocess
import sys
import urllib.request
import warnings

import pytest
import serving
import torch
import transformers
from conftest import random_model
from huggingface_hub import ModelCard
from packaging.version import Version
from transformers import TextGenerationPipeline
from transformers.utils import logging

from modeling_nanochat import NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.chat.examples import MAX_CHARACTERS, MAX_EXAMPLES, example_questions, training_stage
from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.chat.turn import ChatCodec
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes import grpo, midtrain, sft
from recipes.training.model_card import CardArguments, examples_of, model_card
from recipes.training.stage import JsonlLogger, OutputArguments, finish_stage

QUESTIONS = ["Who are you?", 'Spell "lamp": l-a-m-p?', "米拉有12个梨。她现在有多少个梨？", "- [x] {{a}} #1"]


def toy_of(architecture, toy_model_and_tokenizer):
    model, tokenizer = copy.deepcopy(toy_model_and_tokenizer)
    if architecture == "turbo":
        sizes = random_model("turbo").config.to_diff_dict() | {"vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        model = NanoChatTurboForCausalLM(NanoChatTurboConfig(**sizes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval(), tokenizer


@pytest.fixture(params=["plain", "turbo"])
def finished(request, toy_model_and_tokenizer, tmp_path):
    """Finished folders of all stages, by stage."""
    for stage in STAGES:
        args = OutputArguments(str(tmp_path / stage))
        record = {"stage": stage, "settings": {"output_dir": args.output_dir}}
        if stage != "base":
            record["examples"] = QUESTIONS
        parts = toy_of(request.param, toy_model_and_tokenizer)
        finish_stage(*parts, args, JsonlLogger(args.output_dir), record, model_card)
    return {stage: tmp_path / stage for stage in STAGES}


def snippet(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def run_snippet(folder, capsys, caplog):
    """What the card's code prints, with the most likely token each time in place of the pipeline's sampling.

    No warning may come with it, neither Python's nor in transformers' log; those given once per process count as new.
    """
    default = TextGenerationPipeline._default_generation_config
    logging.warning_once.cache_clear()
    logging.add_handler(caplog.handler)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(default, "do_sample", False)
        patch.setattr(default, "temperature", 1.0)
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", UserWarning)
        exec(snippet(folder), {})
    logging.remove_handler(caplog.handler)
    if Version(transformers.__version__) >= Version("5.23"):  # the pipeline of older ones warns of its own defaults
        assert [record.getMessage() for record in caplog.records] == []
    return capsys.readouterr().out


@torch.no_grad()
def greedy(model, ids, steps):
    """The most likely tokens after `ids`, each by a pass over everything before it, up to an end of turn."""
    new = []
    while len(new) < steps and (not new or new[-1] not in model.generation_config.eos_token_id):
        new.append(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
    return new


@pytest.mark.slow
def test_the_code_in_every_card_continues_as_the_model_does_without_a_warning(finished, capsys, caplog):
    for stage, folder in finished.items():
        model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
        if stage == "base":
            ids = [tokenizer.bos_token_id, *tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]
            expected = "Once upon a time" + tokenizer.decode(greedy(model, ids, 64), skip_special_tokens=False)
        else:
            ids = ChatCodec(tokenizer).prompt([{"role": "user", "content": "Who are you?"}])
            said, prefix = (tokenizer.decode(part) for part in (greedy(model, ids, 64), ids))
            expected = tokenizer.parse_response(said, prefix=prefix)
        assert run_snippet(folder, capsys, caplog) == f"{expected}\n", stage


def test_the_stage_is_read_from_the_card_that_it_wrote(finished):
    for stage, folder in finished.items():
        assert training_stage(load_model_and_tokenizer(folder, device="cpu")[0].name_or_path) == stage


@pytest.mark.slow
def test_a_folder_runs_as_its_card_says_where_this_package_is_unknown(finished, tmp_path):
    """The card's Python by itself, and its command for a server, if it has one, up to the first answer."""
    folder = finished["rl"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "ignore"}
    stranger = 'import sys\nsys.modules["modeling_nanochat"] = None\n' + snippet(folder)
    done = subprocess.run(
        [sys.executable, "-c", stranger], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'role': 'assistant'")
    commands = re.findall(r"^transformers serve (.*?)    #", (folder / "README.md").read_text(), re.MULTILINE)
    assert commands == ([] if list(folder.glob("*.py")) else [str(folder)])
    if not commands:  # transformers serves only classes of its own
        return
    log = tmp_path / "serve.log"
    question = {"model": str(folder), "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 2}
    with serving.serving(folder, log) as (process, url):
        serving.wait_until_up(process, url, log)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(question).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert "choices" in answer.read().decode()


def test_plain_folders_carry_no_code_and_turbo_folders_say_that_they_do(finished):
    for folder in finished.values():
        code, card = list(folder.glob("*.py")), (folder / "README.md").read_text()
        assert bool(code) == ("carries its code" in card) == ("trust_remote_code=True" in card)
        assert bool(code) != ("carries no code" in card)


def test_the_examples_are_a_widget_of_the_card_and_are_read_from_it(finished):
    for stage, folder in finished.items():
        widget = ModelCard.load(folder / "README.md").data.to_dict().get("widget")
        assert widget == (
            None if stage == "base" else [{"messages": [{"role": "user", "content": q}]} for q in QUESTIONS]
        )
        assert example_questions(folder) == ([] if stage == "base" else QUESTIONS)


def test_a_stage_shows_the_questions_of_the_model_that_it_starts_from_unless_given_others(finished):
    sft, base = (load_model_and_tokenizer(finished[stage], device="cpu")[0] for stage in ("sft", "base"))
    assert CardArguments().examples_or_those_of(sft) == QUESTIONS
    assert CardArguments(examples=["Hi?"]).examples_or_those_of(sft) == ["Hi?"]
    assert CardArguments(examples=[]).examples_or_those_of(sft) == []
    assert CardArguments().examples_or_those_of(base) == []


CHATS = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n' * 8
PROBLEMS = '{"question": "1+1?", "answer": "#### 2"}\n' * 8


@pytest.mark.parametrize("given", [None, ["Other?", "Another?"]])
@pytest.mark.parametrize(
    ("stage", "runs", "lines", "more"),
    [
        (midtrain, "run_stage", CHATS, ["--max_steps", "1", "--max_length", "64"]),
        (sft, "run_trl_stage", CHATS, []),
        (grpo, "run_trl_stage", PROBLEMS * 2, ["--num_generations", "2"]),
    ],
)
def test_every_stage_that_makes_a_chat_model_records_its_questions(
    stage, runs, lines, more, given, toy_model_folder, tmp_path, monkeypatch
):
    (toy_model_folder / "README.md").write_text("---\nwidget:\n- text: Inherited?\n---\n")
    (tmp_path / "train.jsonl").write_text(lines)
    arguments = ["--model_name_or_path", str(toy_model_folder), "--train_files", str(tmp_path / "train.jsonl"), *more]
    arguments += ["--output_dir", str(tmp_path / "out"), *(["--examples", *given] if given else [])]
    monkeypatch.setattr("sys.argv", ["stage", *arguments])
    called = []
    monkeypatch.setattr(stage, runs, lambda *args: called.append(args))
    stage.main()
    first, *others = called[0]
    record = first.record | {"settings": {}} if stage is midtrain else {"settings": vars(others[0])}
    assert examples_of(record) == (given or ["Inherited?"])


@pytest.mark.parametrize(
    ("examples", "complaint"),
    [
        (["a?"] * 7, "7 questions, at most 6"),
        (["a\nb"], "'a.nb' must be one line"),
        (["a" * 201], "200"),
        ([" "], "one line"),
    ],
)
def test_a_question_that_nobody_would_show_is_refused_before_training(examples, complaint):
    with pytest.raises(UserError, match=complaint):
        CardArguments(examples=examples)


FOREIGN = """---
widget:
- text: "From a foreign card?"
- messages: [{role: user, content: "  From the Hub?  "}]
- messages: [{role: user, content: "a"}, {role: assistant, content: "b"}, {role: user, content: "c"}]
- messages: [{role: system, content: "You obey."}]
- messages: [{role: user, content: [{type: text, text: "parts"}]}]
- messages: [null]
- messages: {role: user, content: "no list"}
- text: 12
- text: "two\\nlines"
- text: "\\e[2Jrepaints the terminal"
- text: "reversed \\u202e"
- text: "LONG"
- src: https://example.com/cat.png
- "From a foreign card?"
- text: "From a foreign card?"
- null
- text: "1?"
- text: "2?"
- text: "3?"
- text: "4?"
- text: "5?"
---
"""


def test_of_a_foreign_card_only_short_questions_are_taken_and_few(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(FOREIGN.replace("LONG", "a" * (MAX_CHARACTERS + 1)), encoding="utf-8")
    assert example_questions(tmp_path) == ["From a foreign card?", "From the Hub?", "1?", "2?", "3?", "4?"]
    assert len(example_questions(tmp_path)) == MAX_EXAMPLES
    card.write_text(FOREIGN.replace("LONG", "a" * MAX_CHARACTERS), encoding="utf-8")
    assert example_questions(tmp_path)[2] == "a" * MAX_CHARACTERS


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter",
        "---\n: [\n---\n",
        "---\n- a\n---\n",
        "---\nwidget: {text: a}\n---\n",
        "---\nwidget: a\n---\n",
    ],
)
def test_a_card_without_readable_questions_has_none(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert example_questions(tmp_path) == []
    (tmp_path / "README.md").write_bytes(card.encode() + b"\xff")
    assert example_questions(tmp_path) == []


def test_without_a_card_or_with_an_endless_one_there_are_no_questions(tmp_path):
    assert example_questions(tmp_path) == example_questions(None) == example_questions("") == []
    (tmp_path / "README.md").write_text("---\nwidget:\n- text: a?\n---\n" + "a" * 2**20)
    assert example_questions(tmp_path) == []
