"""lm-eval on model folders as they are: the choices, replies and accuracies of `evals/evaluate_model.py`."""

import json
import shlex
import sys
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from conftest import random_model, toy_tokenizer

from evals.evaluate_model import EvaluateArguments, run_evaluation
from evals.lm_eval.questions import cloze_choice, documents, grade_reply, reply_documents
from evals.tasks.continuations import ContinuationQuestion
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_jsonl
from modeling_nanochat.tokenization_nanochat import set_special_tokens, special_token_ids

lm_eval = pytest.importorskip("lm_eval")

FOLDER = Path(__file__).parents[2] / "evals" / "lm_eval"
LENGTH = 12  # tokens per reply
WORDS = ("mat", "lamp", "story", "model", "cat on the mat", "small model upon a time", "word")
HISTORY = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a small model."}]
RECORDS = {
    "cloze": [
        *({"query": f"The {WORDS[i]} is", "choices": WORDS[: i + 2], "gold": i % 2} for i in range(5)),
        # a blank that is a token of its own
        *({"query": f"{i}+7 is", "choices": [f"{i + 7}", f"{i}07", f"{i}0000 mats"], "gold": i % 2} for i in range(9)),
        {"query": "Once", "choices": ["upon a time", "upon a lamp", "upon a small story"], "gold": 1},
        {"query": "A model", "choices": ["sat", "sat on", "sat on the lamp"], "gold": 0},
        {"query": "<|bos|>Tell", "choices": ["<|user_end|>me", "a <|bos|> story"], "gold": 0},
        {"query": "Who are", "choices": ["你", "她", "it"], "gold": 2, "continuation_delimiter": "\n\n"},
        {"query": "Who are", "choices": ["you", "she is"], "gold": 1, "continuation_delimiter": ""},
    ],
    "letters": [
        *({"question": f"What is a {word}?", "choices": WORDS[:4], "answer": i % 4} for i, word in enumerate(WORDS)),
        {"question": "<|bos|>?", "choices": ["yes", "no"], "answer": 1},
    ],
    "replies": [
        {"question": f"A {word}?", "answer": "x", "rivals": [], "history": HISTORY * (i % 3)}
        for i, word in enumerate(WORDS)
    ],
}


@pytest.fixture(scope="module", params=["plain", "turbo"])
def results(request, tmp_path_factory):
    """By task: the record and the predictions of our evaluation, and lm-eval's accuracy and samples."""
    folder, tokenizer = tmp_path_factory.mktemp("evaluated"), toy_tokenizer()
    model = random_model(request.param, vocab_size=len(tokenizer))
    set_special_tokens(model, tokenizer)
    with torch.no_grad():  # no reply calls the tool
        model.lm_head.weight[special_token_ids(tokenizer)["<|python_start|>"]] = 0
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    replies = [row["reply"] for row in by_us(folder, {"replies": RECORDS["replies"]})[1]["replies"]]
    answered = [  # half of them are right
        record | {"answer": (reply.split() or ["x"])[0] if i % 2 else "x"}
        for i, (record, reply) in enumerate(zip(RECORDS["replies"], replies, strict=True))
    ]
    records, predictions = by_us(folder, RECORDS | {"replies": answered})
    accuracies, samples = by_lm_eval(folder)
    return {name: (records[name], predictions[name], accuracies[name], samples[name]) for name in RECORDS}


def by_us(folder, questions):
    """Record and predictions of each task, whose questions are written into the folder."""
    for name, records in questions.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    arguments = EvaluateArguments(
        str(folder / "model"),
        str(folder / "results.json"),
        [f"{name}={folder / name}.jsonl" for name in questions],
        max_new_tokens=LENGTH,
        output_predictions=str(folder / "predictions.jsonl"),
    )
    records = {record["task"]: record for record in run_evaluation(arguments)["records"]}
    rows = [row for _, row in read_jsonl(folder / "predictions.jsonl")]
    return records, {name: [row for row in rows if row["task"] == name] for name in questions}


def by_lm_eval(folder):
    """Accuracy and samples of each task, by the YAML files of `evals/lm_eval`."""
    from lm_eval.tasks import TaskManager

    model = {"pretrained": str(folder / "model"), "dtype": "float32", "trust_remote_code": True}
    metadata = model | {name: str(folder / f"{name}.jsonl") for name in RECORDS}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=[f"nanochat_{name}" for name in RECORDS],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata),
        gen_kwargs={"max_gen_toks": LENGTH},
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    accuracies = {name: found["results"][f"nanochat_{name}"]["acc,none"] for name in RECORDS}
    samples = {name: sorted(found["samples"][f"nanochat_{name}"], key=itemgetter("doc_id")) for name in RECORDS}
    return accuracies, samples


def likelihoods(sample):
    return [likelihood for likelihood, _ in sample["filtered_resps"]]


@pytest.mark.parametrize("task", RECORDS)
def test_the_accuracy_is_ours_on_every_question(results, task):
    record, predictions, accuracy, samples = results[task]
    assert accuracy == pytest.approx(record["value"]) and 0 < accuracy < 1
    assert [sample["acc"] == 1 for sample in samples] == [row["right"] for row in predictions]


def test_the_choices_of_cloze_questions_are_ours_by_mean_loss(results):
    _, predictions, _, samples = results["cloze"]
    choices = [cloze_choice(sample["doc"], sample["filtered_resps"]) for sample in samples]
    assert [f"choice {choice + 1}" for choice in choices] == [row["reply"] for row in predictions]
    sums = [likelihoods(sample) for sample in samples]
    assert choices != [found.index(max(found)) for found in sums]


def test_the_letters_are_ours(results):
    _, predictions, _, samples = results["letters"]
    found = [(sample["doc"]["letters"], likelihoods(sample)) for sample in samples]
    assert [letters[ls.index(max(ls))] for letters, ls in found] == [row["reply"] for row in predictions]


def test_the_replies_are_ours(results):
    _, predictions, _, samples = results["replies"]
    assert [sample["filtered_resps"] for sample in samples] == [[row["reply"]] for row in predictions]


def test_a_reply_is_graded_as_ours_is():
    document = {"record": json.dumps({"question": "12 + 7?", "answer": "12 + 7 = <<12+7=19>>19.\n#### 19"})}
    assert grade_reply(document, ["12 + 7 = 19.\n#### 19"]) == {"acc": 1}
    assert grade_reply(document, ["12 + 7 = 12+7"]) == {"acc": 0}  # a call without a tool loop


def test_missing_and_other_questions_are_reported(toy_model_folder, tmp_path):
    path = tmp_path / "cloze.jsonl"
    path.write_text(json.dumps(RECORDS["cloze"][0]) + "\n")
    with pytest.raises(UserError, match="nanochat_replies has no questions; add --metadata replies=SOURCE"):
        reply_documents(pretrained=str(toy_model_folder))
    with pytest.raises(UserError, match=r"cloze.jsonl:1: nanochat_replies has no records of cloze"):
        reply_documents(pretrained=str(toy_model_folder), replies=str(path))
    with pytest.raises(UserError, match="nanochat_cloze needs the tokenizer; add --metadata tokenizer=FOLDER"):
        documents("cloze", ContinuationQuestion, dict, {"cloze": str(path)})


def test_the_documented_command_is_one_of_lm_eval(monkeypatch):
    from lm_eval._cli import HarnessCLI

    readme = (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = (line for line in readme.splitlines() if line.startswith("lm-eval run"))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    arguments = HarnessCLI().parse_args()
    assert arguments.include_path == "evals/lm_eval" and set(arguments.metadata) <= RECORDS.keys()
    named = "".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    assert all(f"task: {task}\n" in named for task in arguments.tasks)
