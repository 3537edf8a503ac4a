"""What the model wrote, as transformers parses it and as the engine reads it; and padding, which is no content."""

import itertools

import pytest
import torch
from conftest import random_model, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, pipeline

from modeling_nanochat.chat.turn import ChatCodec, Finished, ToolCall, Turn
from modeling_nanochat.tokenization_nanochat import PAD, SPECIAL_TOKENS, set_special_tokens, special_token_ids

TOKENIZER = toy_tokenizer()
IDS = special_token_ids(TOKENIZER)
WORDS = [TOKENIZER.encode(text, add_special_tokens=False)[0] for text in ("a", " b", "1", "+", "\n", "<", "|", ">")]
PROMPT = "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>"
CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+1"}}}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("Hello.<|assistant_end|><|bos|>", {"content": "Hello."}),
        ("Hello.<|assistant_end|>" + 3 * PAD, {"content": "Hello."}),
        ("Hello.<|assistant_end|><|user_start|>and on", {"content": "Hello."}),
        ("a<|python_start|>1+1<|python_end|>", {"content": "a", "tool_calls": [CALL]}),
        ("a<|python_start|>1+1<|assistant_end|>", {"content": "a"}),
        ("a<|python_start|>1+1", {"content": "a"}),
        ("<|python_start|><|python_end|>4<|user_end|>2", {"content": "42"}),
        ("<|python_start|><|python_end|><|python_start|>1+1<|python_end|>", {"tool_calls": [CALL]}),
        ("<|python_start|>2<|python_start|>1+1<|python_end|>", {"tool_calls": [CALL]}),
        (" a\n", {"content": " a\n"}),
    ],
)
def test_a_reply_is_parsed_whole_and_token_by_token(reply, message):
    assert TOKENIZER.parse_response(reply, prefix=PROMPT) == {"role": "assistant"} | message
    parser = TOKENIZER.get_response_parser(prefix=PROMPT)
    for character in reply:
        parser.feed(character)
    assert parser.finalize()[0] == {"role": "assistant"} | message


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.sampled_from([*WORDS, *IDS.values(), IDS["<|python_start|>"], IDS["<|python_end|>"]]),
        min_size=1,
        max_size=14,
    )
)
def test_engine_and_parser_agree_on_every_sequence_of_tokens(ids):
    """Up to where generation stops: at the end of the turn or of a call."""
    ends = {IDS[name] for name in ("<|assistant_end|>", "<|python_end|>", "<|bos|>", PAD)}
    ids = [*itertools.takewhile(lambda token: token not in ends, ids), *[token for token in ids if token in ends][:1]]
    turn = Turn(ChatCodec(TOKENIZER), tool=lambda code: "", max_length=len(ids))
    events = [event for token in ids if not turn.finish_reason for event in turn.advance(token)]
    codes = [event.code for event in events if isinstance(event, ToolCall)]
    text = next(event for event in events if isinstance(event, Finished)).messages[0]["content"]
    parsed = TOKENIZER.parse_response(ids, prefix=PROMPT)
    assert (parsed.get("content") or "") == text
    assert [call["function"]["arguments"]["code"] for call in parsed.get("tool_calls", [])] == codes


def test_a_pipeline_loses_no_reply_that_is_shorter_than_its_batchs_longest(toy_model_folder, monkeypatch):
    chat = pipeline("text-generation", str(toy_model_folder))
    replies = ["Hello.<|assistant_end|>", "It is 19, I think.<|assistant_end|>"]

    def generate(input_ids, **kwargs):
        written = [chat.tokenizer.encode(reply, add_special_tokens=False) for reply in replies[: len(input_ids)]]
        longest = max(map(len, written))
        padded = [ids + [chat.tokenizer.pad_token_id] * (longest - len(ids)) for ids in written]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    monkeypatch.setattr(chat.model, "generate", generate)
    answers = chat([[{"role": "user", "content": text}] for text in ("Hi", "What is 12+7?")], batch_size=2)
    assert [answer[0]["generated_text"][-1]["content"] for answer in answers] == ["Hello.", "It is 19, I think."]


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_generation_without_a_mask_is_generation_with_one(architecture):
    """A prompt that begins with `<|bos|>` and has every control token in it, as a history with calls has."""
    model = random_model(architecture)
    set_special_tokens(model, TOKENIZER)
    ids = torch.tensor([[*IDS.values(), *WORDS]])
    assert ids[0, 0] == TOKENIZER.bos_token_id and len(SPECIAL_TOKENS) == len(IDS)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": model.generation_config.eos_token_id}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_no_label_that_a_model_learns_is_taken_for_padding():
    collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    chat = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    rendered = TOKENIZER.apply_chat_template(chat, return_dict=True)["input_ids"]
    document = TOKENIZER("A cat.")["input_ids"]
    batch = collate([{"input_ids": rendered + [IDS["<|assistant_end|>"]]}, {"input_ids": document}])
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][real], batch["input_ids"][real]) and (batch["labels"][~real] == -100).all()
