"""Any causal language model is evaluated: GPT-2's architecture, and chat models with templates of their own."""

import math

import pytest
import torch
from evaluation import arguments, write_core, write_lines, write_tasks
from other_models import CHATML, chatml_llama, gpt2

from evals.bits_per_byte import text_rows
from evals.core.score import core, load_core
from evals.evaluate_model import run_evaluation
from evals.harness.asking import chat_engine
from evals.tasks.task_files import load_task
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.tokenization_nanochat import document_start, encode_documents


@pytest.fixture
def files(tmp_path):
    write_tasks(tmp_path)
    return tmp_path


def by_task(results):
    return {record["task"]: record for record in results["records"]}


def test_gpt2_goes_through_everything_that_needs_no_chat(files):
    args = arguments(gpt2(files / "gpt2"), files, base_model=True)
    args.tasks.append(f"core={write_core(files / 'core')}")
    records = by_task(run_evaluation(args))
    assert set(records) == {"text", "cloze", "core", "core_mats_0", "core_mats_2"}
    assert records["text"]["n"] == 30 * len("The cat sat on the mat.") and records["text"]["value"] > 1


def test_gpt2_is_measured_as_transformers_computes_its_loss(files):
    """Bits per byte from the loss that the model itself returns, document by document of a row."""
    folder = gpt2(files / "gpt2")
    args = arguments(folder, files, tasks=[], base_model=True, max_length=64)
    (record,) = run_evaluation(args)["records"]
    model, tokenizer = load_model_and_tokenizer(folder)
    nats, size = 0.0, 0
    texts = ["The cat sat on the mat."] * 30
    rows = text_rows(tokenizer, texts, max_length=64, max_tokens=200_000)
    for row in (tokens[:, 0].tolist() for tokens in rows):
        ids = torch.tensor([row])
        labels = ids.masked_fill(ids == tokenizer.eos_token_id, -100)
        nats += model(ids, labels=labels).loss.item() * (labels[0, 1:] >= 0).sum().item()
        size += sum(len(tokenizer.decode([token])) for token in row[1:] if token != tokenizer.eos_token_id)
    assert size == record["n"] and record["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_batch_of_gpt2_is_scored_as_one_at_a_time(files):
    """Its positions are absolute: padding must not move them."""
    queries = ["The cat", "Once upon a time there was a lamp. What is", "Who are you? I am a small"]
    records = [{"query": query, "choices": ["mat.", "a lamp", "19"], "gold": n} for n, query in enumerate(queries)]
    write_lines(write_core(files / "core") / "cloze.jsonl", records * 4)
    model, tokenizer = load_model_and_tokenizer(gpt2(files / "gpt2"))
    tasks = load_core(files / "core")
    batch, alone = (core(model, tokenizer, tasks, batch_size=size) for size in (8, 1))
    assert batch == alone


@pytest.mark.parametrize("make", [gpt2, chatml_llama])
def test_a_document_begins_with_bos_or_what_separates_documents(files, make):
    _, tokenizer = load_model_and_tokenizer(make(files / "model"))
    assert encode_documents(tokenizer, ["The"])[0][0] == document_start(tokenizer) == tokenizer.eos_token_id
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="has neither a bos nor an eos token"):
        document_start(tokenizer)


def test_without_a_chat_template_chat_tasks_are_refused_before_anything_is_asked(files, monkeypatch):
    monkeypatch.setattr("evals.evaluate_model.text_result", None)
    args = arguments(gpt2(files / "gpt2"), files)
    complaint = "gpt2: the tokenizer has no chat template, which problems, facts, letters need; set base_model true"
    with pytest.raises(UserError, match=complaint) as error:
        run_evaluation(args)
    assert "\n" not in str(error.value)


def gpt2_with_chatml(folder):
    return gpt2(folder, chat_template=CHATML)


@pytest.mark.parametrize("make", [chatml_llama, gpt2_with_chatml])
def test_a_chat_model_with_a_template_of_its_own_answers_every_task(files, make):
    args = arguments(make(files / "model"), files, output_predictions=str(files / "predictions.jsonl"))
    results = run_evaluation(args)
    assert set(by_task(results)) == {"text", "problems", "facts", "letters", "cloze"}
    assert results["samples"][-1]["messages"][0]["content"] == "Who are you?"
    assert any(message["content"] for sample in results["samples"] for message in sample["messages"][1:])


@pytest.mark.parametrize("make", [chatml_llama, gpt2_with_chatml])
def test_its_replies_in_a_batch_are_those_that_generate_gives_alone(files, make):
    """Prompts of different lengths are padded on the left; a reply ends with the model's own eos token."""
    model, tokenizer = load_model_and_tokenizer(make(files / "model"))
    questions = ["What is 12+7?", "Who?", "Tell me a story. Once upon a time there was a lamp."]
    engine = chat_engine(model, tokenizer, [load_task("facts", str(files / "facts.jsonl"))])
    chats = [[{"role": "user", "content": question}] for question in questions]
    replies = engine.generate_batch(chats, engine.options.__class__(temperature=0), max_new_tokens=12)
    for chat, reply in zip(chats, replies, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        beyond = list(range(len(tokenizer), model.config.vocab_size)) or None
        alone = model.generate(**ids, max_new_tokens=12, do_sample=False, suppress_tokens=beyond, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        text = tokenizer.decode(alone, skip_special_tokens=True)
        assert reply == [{"role": "assistant", "content": text}]


def test_a_chat_model_that_cannot_end_a_reply_is_refused(files):
    folder = chatml_llama(files / "model")
    model, tokenizer = load_model_and_tokenizer(folder)
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    with pytest.raises(UserError, match="no eos token to end a reply with"):
        chat_engine(model, tokenizer, [load_task("facts", str(files / "facts.jsonl"))])


def test_a_loss_that_is_not_finite_is_recorded_as_such_and_such_a_model_is_not_asked(files):
    folder = gpt2_with_chatml(files / "model")
    model, _ = load_model_and_tokenizer(folder)
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(3e38)  # finite, but not its square
    model.save_pretrained(folder)
    (record,) = run_evaluation(arguments(folder, files, tasks=[]))["records"]
    assert record["value"] is None and record["standard_error"] is None and record["n"] > 0
    with pytest.raises(UserError, match="computes other logits") as error:
        run_evaluation(arguments(folder, files))
    assert "\n" not in str(error.value)
