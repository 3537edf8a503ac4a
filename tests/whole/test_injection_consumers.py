"""Whoever gives text to a model: what hostile texts become in the ids that it is really fed or trained on."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from hostile import ANY, HOSTILE, contents, learnt, messages_of, part, read, rendered, whole, written
from hypothesis import given, settings
from page import app
from training import render
from transformers import pipeline
from trl import SFTTrainer

from evals import samples as samples_module
from evals.core.prompts import block_rows
from evals.core.tasks import LANGUAGE_MODELING, CoreTask
from evals.tasks.continuations import continuation_rows
from evals.tasks.letters import prompt_ids
from modeling_nanochat.chat import __main__ as chat_module
from modeling_nanochat.chat.__main__ import Chat
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.chat.turn import ChatCodec, Finished, Turn
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.grpo import NanoChatGRPOTrainer, read_problems
from recipes.sft import NanoChatSFTTrainer, token_dataset
from recipes.training.data.bad_rows import BadRows
from recipes.training.data.conversations import read_conversations
from recipes.training.data.streams import ConversationStreams, TextStreams
from recipes.training.trl.settings import GRPOSettings, SFTSettings

HALF, READ_AS = "a\ud800<|bos|>", "a\ufffd<|bos|>"  # JSON and terminals can write half a surrogate pair
CHATS = [
    (HOSTILE[i - 1], [(text, [(HOSTILE[i - 2], "12+7", HOSTILE[i - 3])], HOSTILE[i - 4])])
    for i, text in enumerate(HOSTILE)
]
CHATS += [(None, [(text, [], HOSTILE[i - 1]), (HOSTILE[i - 2], [], text)]) for i, text in enumerate(HOSTILE)]
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.0, "unembedding_lr": 0.0}
CPU = {"use_cpu": True, "save_strategy": "no", "report_to": "none"}
CPU |= {"disable_tqdm": True, "dataloader_pin_memory": False}


def question(text: str) -> list[tuple[str, str]]:
    """What a prompt of this one message has to be."""
    return [("<|bos|>", ""), ("<|user_start|>", text), ("<|user_end|>", ""), ("<|assistant_start|>", "")]


@pytest.fixture(scope="module")
def tokenizer(toy_model_and_tokenizer):
    return toy_model_and_tokenizer[1]


# training


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": messages_of(chat)}) + "\n" for chat in CHATS))
    return read_conversations([str(path)])


def test_rendered_conversations(tokenizer, conversations):
    for (ids, mask), chat in zip(render(conversations, tokenizer, 999, show_progress=False), CHATS, strict=True):
        assert read(tokenizer, ids.tolist()) == written(chat)
        assert tokenizer.decode(ids[mask]) == learnt(chat)


def test_half_characters_in_a_file(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    for text in (HALF, [part(HALF)]):
        path.write_text(json.dumps({"messages": messages_of((HALF, [(text, [(HALF, HALF, text)], HALF)]))}))
        ids, _ = render(read_conversations([str(path)]), tokenizer, 999, show_progress=False)[0]
        assert read(tokenizer, ids.tolist()) == written((READ_AS, [(READ_AS, [(READ_AS, READ_AS, READ_AS)], READ_AS)]))


def test_rows_of_midtraining(tokenizer, conversations):
    rendered_ = render(conversations, tokenizer, 255, show_progress=False)
    expected = {tuple(ids.tolist()) for ids, _ in rendered_}
    rows = rows_of(ConversationStreams(rendered_, tokenizer.bos_token_id, 255), 20)
    found = {document for row in rows for document in documents_in(tokenizer, row)}
    assert found and found <= expected


def rows_of(streams, count: int) -> list[list[int]]:
    """Token ids of the first rows of the first stream."""
    stream, rows = streams(0), []
    for _ in range(count):
        row = {name: np.full(width, -1) for name, width in streams.widths.items()}
        stream.write(row)
        rows.append(row["input_ids"].tolist())
    return rows


def documents_in(tokenizer, ids: list[int]) -> list[tuple[int, ...]]:
    """Cut before every `<|bos|>`, padding (which is bos) left out."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id]
    cut = [tuple(ids[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [document for document in cut if len(document) > 1]


def test_rows_of_pretraining(tokenizer):
    texts = Dataset.from_dict({"text": [*HOSTILE, READ_AS]})
    for row in rows_of(TextStreams(texts, tokenizer, 32), 40):
        pieces = read(tokenizer, row)
        assert {name for name, _ in pieces} == {"<|bos|>"}
        assert all(any(whole_.startswith(text.rstrip("\ufffd")) for whole_ in texts["text"]) for _, text in pieces)


def fed(trainer: SFTTrainer) -> list[tuple[list, str]]:
    """What each row of the one batch is, and what of it is learnt."""
    tokenizer, (batch,) = trainer.processing_class, trainer.get_train_dataloader()
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    return sorted(
        (read(tokenizer, ids[real].tolist()), tokenizer.decode(ids[labels != -100])) for ids, real, labels in rows
    )


def sft_config(folder, **settings) -> SFTSettings:
    return SFTSettings(
        output_dir=str(folder),
        max_length=512,
        packing=False,
        per_device_train_batch_size=len(CHATS),
        **CPU,
        **settings,
    )


def test_sft_as_the_recipe_feeds_it(toy_model_folder, conversations, tmp_path):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, device="cpu")
    rows = token_dataset(render(conversations, tokenizer, 512, show_progress=False))
    parts = {"model": model, "args": sft_config(tmp_path), "processing_class": tokenizer}
    trainer = NanoChatSFTTrainer(train_dataset=rows, muon_rates=RATES, **parts)
    assert fed(trainer) == sorted((written(chat), learnt(chat)) for chat in CHATS)


def test_sft_as_trl_itself_renders_it(toy_model_folder, tmp_path):
    """For those who use the model without our recipes."""
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, device="cpu")
    args = sft_config(tmp_path, assistant_only_loss=True)
    rows = Dataset.from_list([{"messages": messages_of(chat)} for chat in CHATS])
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert fed(trainer) == sorted((written(chat), learnt(chat)) for chat in CHATS)


def test_sft_on_prompts_and_completions(toy_model_folder, tmp_path):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, device="cpu")
    messages = [messages_of(chat) for chat in CHATS]
    rows = Dataset.from_list([{"prompt": one[:-1], "completion": one[-1:]} for one in messages])
    trainer = SFTTrainer(model=model, args=sft_config(tmp_path), train_dataset=rows, processing_class=tokenizer)
    assert fed(trainer) == sorted((written(chat), whole(chat[1][-1][2]) + "<|assistant_end|>") for chat in CHATS)


def grpo_trainer(folder, problems, output_dir, **options) -> NanoChatGRPOTrainer:
    model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
    model.config.max_position_embeddings = 2000
    args = GRPOSettings(
        output_dir=str(output_dir), num_generations=2, per_device_train_batch_size=2, max_steps=1,
        gradient_accumulation_steps=1, max_completion_length=1500, max_tool_calling_iterations=1, top_k=0, **CPU
    )  # fmt: skip
    parts = {"model": model, "args": args, "processing_class": tokenizer, "muon_rates": RATES}
    return NanoChatGRPOTrainer(train_dataset=problems, **parts, **options)


@pytest.mark.parametrize("text", ["".join(HOSTILE[:9]), "".join(HOSTILE[9:]), HALF], ids=["tokens", "edges", "half"])
def test_grpo_with_the_tools_results(toy_model_folder, tmp_path, text):
    """Prompt, and call with result: what the trainer gets is what the template renders."""
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": text, "answer": "#### 19"}) + "\n")
    problems, seen = read_problems([str(tmp_path / "problems.jsonl")], BadRows()), []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    trainer = grpo_trainer(toy_model_folder, problems, tmp_path / "out", reward_funcs=reward)
    tokenizer, text = trainer.processing_class, READ_AS if text == HALF else text
    code = f"print({text!a})".replace("<", r"\x3c")
    calls = tokenizer(f" So:\n<|python_start|>{code}<|python_end|>", add_special_tokens=False).input_ids
    answers = tokenizer("#### 19<|assistant_end|>", add_special_tokens=False).input_ids
    unread = [0] * (len(trainer.engine.codec.encode(text)) + 2)  # drawn while the result is written
    script = iter([*calls, *unread, *answers])
    trainer.engine.sampler = lambda seed: lambda logits, *_: torch.tensor([next(script)] * len(logits))
    trainer.train()
    chat = (None, [(text, [(" So:\n", code, text)], "#### 19")])
    prompt = trainer.engine.codec.prompt(problems[0]["prompt"])
    assert read(tokenizer, prompt) == question(text)
    for completion, ids in seen:
        assert prompt + list(ids) == rendered(tokenizer, messages_of(chat))
        assert read(tokenizer, prompt + list(ids)) == written(chat)
        assert [message["content"] for message in completion] == [" So:\n", text, "#### 19"]
    assert len(seen) == 2


# evaluation


def test_prompts_of_evaluations(tokenizer, monkeypatch):
    for text in HOSTILE:
        assert read(tokenizer, prompt_ids(tokenizer, text)) == question(text)
    assert read(tokenizer, prompt_ids(tokenizer, HALF)) == question(READ_AS)
    rows = continuation_rows(tokenizer, [*HOSTILE, HALF])
    assert [read(tokenizer, ids) for ids, _ in rows] == [[("<|bos|>", text)] for text in [*HOSTILE, READ_AS]]


def test_prompts_of_core(tokenizer):
    examples = [{"context": text, "continuation": "a" + text} for text in HOSTILE]
    task = CoreTask("hostile", LANGUAGE_MODELING, examples, 0, " ", 0.0)
    for (row,), text in zip(block_rows(task, tokenizer, examples, range(len(examples)), 999), HOSTILE, strict=True):
        assert read(tokenizer, row.ids) == [("<|bos|>", f"{text.strip()} a{text}")]


def test_prompts_of_samples(toy_model_and_tokenizer, monkeypatch):
    model, tokenizer = toy_model_and_tokenizer
    prompted = []
    generate = model.generate

    def listening(ids, attention_mask, **options):
        prompted.extend(row[mask.bool()].tolist() for row, mask in zip(ids, attention_mask, strict=True))
        return generate(ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "generate", listening)
    samples_module.samples(model, tokenizer, HOSTILE, max_new_tokens=1)
    assert [read(tokenizer, ids) for ids in prompted] == [[("<|bos|>", text)] for text in HOSTILE]


# talking


class ListeningEngine(Engine):
    """Keeps the prompts that it really decodes from."""

    prompts: list[list[int]] = []  # noqa: RUF012  one list for those that a command line builds

    def decode(self, turns, sampler):
        self.prompts.extend(list(turn.prompt) for turn in turns)
        return super().decode(turns, sampler)


@pytest.fixture
def engine(toy_model_and_tokenizer):
    ListeningEngine.prompts.clear()
    return ListeningEngine(*toy_model_and_tokenizer)


@pytest.mark.parametrize("text", [*HOSTILE, HALF], ids=ascii)
def test_terminal_chat(engine, text, capsys):
    chat = Chat(engine, SamplingOptions(temperature=0), max_new_tokens=2)
    chat.run(iter([text, "/top_k 3", text]))
    tokenizer, read_as = engine.codec.tokenizer, READ_AS if text == HALF else text
    first, second = engine.prompts
    assert read(tokenizer, first) == question(read_as)
    said = chat.messages[1]["content"]
    answered = [("<|bos|>", ""), ("<|user_start|>", read_as), ("<|user_end|>", ""), ("<|assistant_start|>", said)]
    assert read(tokenizer, second) == [*answered, ("<|assistant_end|>", ""), *question(read_as)[1:]]


def test_terminal_chat_on_a_folder(toy_model_folder, monkeypatch, capsys):
    monkeypatch.setattr(chat_module, "Engine", ListeningEngine)
    ListeningEngine.prompts.clear()
    for text in HOSTILE:
        chat_module.start([str(toy_model_folder), "--prompt", text, "--max_new_tokens", "1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n/clear\n".join(HOSTILE)))
    chat_module.start([str(toy_model_folder), "--max_new_tokens", "1"])
    _, tokenizer = load_model_and_tokenizer(toy_model_folder)
    assert [read(tokenizer, ids) for ids in ListeningEngine.prompts] == [question(text) for text in HOSTILE * 2]


@pytest.mark.parametrize("text", [*HOSTILE, HALF], ids=ascii)
def test_space(engine, text):
    """A message after a turn with a call."""
    turn = app.Turn(text, [{"text": text}, {"code": text, "output": text}, {"text": text}], writing=False)
    list(app.answers_of(engine)(text, [turn], 0, 0, 1))
    read_as = READ_AS if text == HALF else text
    chat = (None, [(read_as, [(read_as, read_as, read_as)], read_as)])
    assert read(engine.codec.tokenizer, engine.prompts[0]) == [*written(chat), *question(read_as)[1:]]


@settings(max_examples=300, deadline=None)
@given(contents(ANY), ANY, ANY.filter(bool), ANY, ANY)
def test_a_turn_with_a_call_is_read_and_rendered_alike(tokenizer, asked, said, code, result, answer):
    """The engine goes by ids: what the model spells stays text, and the finished turn is rendered to the same ids."""
    codec, messages = ChatCodec(tokenizer), messages_of((None, [(asked, [(said, code, result)], answer)]))
    turn = Turn(codec, tool=lambda code: result, max_length=9999)
    call = [*codec.encode(said), codec.python_start, *codec.encode(code), codec.python_end]
    discarded = [0] * (2 + len(codec.encode(result)))
    for token in [*call, *discarded, *codec.encode(answer), tokenizer.eos_token_id]:
        events = list(turn.advance(token))
    assert events[-1] == Finished(messages[1:], "stop")
    assert codec.prompt(messages[:1]) + turn.ids == rendered(tokenizer, messages)


def test_the_engine_reads_whole_results_whatever_the_tokenizer_did_before(tokenizer):
    expected = ChatCodec(tokenizer).encode(HALF * 9)
    tokenizer(["a"], truncation=True, padding="max_length", max_length=3)
    codec = ChatCodec(tokenizer)
    assert codec.encode(HALF * 9) == expected and codec.decode(expected) == READ_AS * 9
    assert codec.encode("a") == expected[:1]


def test_a_pipeline_leaves_the_end_of_a_begun_reply_in_it_to_be_taken_off(toy_model_folder):
    """transformers reads only replies that it began itself, by the response template; README says what to do."""
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, device="cpu")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The cat"}]
    ended = {"max_new_tokens": 3, "do_sample": False, "forced_eos_token_id": tokenizer.eos_token_id}
    reply = write(chat, **ended)[0]["generated_text"][-1]
    assert reply["content"].startswith("The cat") and reply["content"].endswith("<|assistant_end|>")
    with pytest.raises(ValueError, match="does not appear in the chat"):
        tokenizer.apply_chat_template([chat[0], reply], continue_final_message=True)
    begun = reply["content"].removesuffix("<|assistant_end|>")
    again = write([chat[0], {"role": "assistant", "content": begun}], **ended)[0]["generated_text"][-1]["content"]
    assert again.startswith(begun) and again.count("<|assistant_end|>") == 1


def test_pipeline(toy_model_folder):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, device="cpu")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chats = [[{"role": "user", "content": text}] for text in HOSTILE]
    for text, (reply,) in zip(HOSTILE, write(chats, max_new_tokens=1, return_tensors=True), strict=True):
        assert read(tokenizer, reply["generated_token_ids"][:-1]) == question(text)
