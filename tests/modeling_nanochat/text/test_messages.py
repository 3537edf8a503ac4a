"""Results of tools stand behind their calls, whatever order they come in; what matches no call is named."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.tasks.table import to_conversation
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import results_behind_calls, unread_keys

USER, END = {"role": "user", "content": "?"}, {"role": "assistant", "content": "So."}


def call(code, name=None):
    made = {"type": "function", "function": {"name": "python", "arguments": {"code": code}}}
    return made | ({"id": name} if name else {})


def calling(*calls, content="Hm. "):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(text, name=None):
    return {"role": "tool", "content": text} | ({"tool_call_id": name} if name else {})


def rendered(messages, tokenizer):
    conversation = to_conversation({"messages": messages}, "f:1")
    return tokenizer.apply_chat_template(conversation["messages"], tokenize=False)


def test_results_in_another_order_are_rendered_behind_their_calls(toy_model_and_tokenizer):
    messages = [USER, calling(call("1", "a"), call("2", "b")), result("two", "b"), result("one", "a"), END]
    assert rendered(messages, toy_model_and_tokenizer[1]).endswith(
        "<|assistant_start|>Hm. <|python_start|>1<|python_end|><|output_start|>one<|output_end|>"
        "<|python_start|>2<|python_end|><|output_start|>two<|output_end|>So.<|assistant_end|>"
    )


@given(st.integers(1, 5), st.integers(0, 5), st.randoms())
def test_whatever_the_order_every_call_gets_its_result(calls, without_id, rng: random.Random):
    """Results without an id answer the calls that are left, in order."""
    names = [f"id{i}" if i >= without_id else None for i in range(calls)]
    results = [result(str(i), names[i]) for i in range(calls)]
    named = results[without_id:]
    rng.shuffle(named)
    mixed = iter(named)
    shuffled = [*results[:without_id], *mixed]
    ordered = results_behind_calls(
        [USER, calling(*(call(str(i), f"id{i}") for i in range(calls))), *shuffled, END], "x"
    )
    assert ordered[0] == USER and ordered[-1] == END and len(ordered) == 2 + 2 * calls
    for number, (message, answer) in enumerate(zip(ordered[1:-1:2], ordered[2:-1:2], strict=True)):
        (single,) = message["tool_calls"]
        assert single["function"]["arguments"]["code"] == answer["content"] == str(number)
        assert message["content"] == ("" if number else "Hm. ")


def test_one_call_at_a_time_stays_as_it_is():
    messages = [USER, calling(call("1")), result("one"), calling(call("2", "b")), result("two", "b"), END, USER]
    assert results_behind_calls(messages, "x") == messages


def test_a_conversation_may_end_with_its_calls():
    messages = [USER, calling(call("1", "a"), call("2", "b"))]
    assert results_behind_calls(messages, "x") == messages


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([calling(call("1", "a")), result("one", "b"), END], "message 3: `tool_call_id` 'b' answers no call"),
        ([calling(call("1")), result("one", "b"), END], "message 3: `tool_call_id` 'b' answers no call"),
        (
            [calling(call("1", "a"), call("2", "b")), result("one", "a"), result("one", "a"), END],
            "message 4: `tool_call_id` 'a' is the second result of its call",
        ),
        ([calling(call("1")), result("one"), result("two"), END], "message 4: `tool_call_id` None answers no call"),
        ([calling(call("1", "a"), call("2", "b")), result("two", "b"), END], "message 2: call 1 of 2 has no result"),
        ([calling(call("1"), call("2")), result("one")], "message 2: call 2 of 2 has no result"),
    ],
)
def test_results_that_do_not_match_the_calls_are_named(messages, complaint):
    with pytest.raises(UserError, match=f"^f:1, {re.escape(complaint)}"):
        to_conversation({"messages": [USER, *messages]}, "f:1")


def test_nanochats_own_parts_keep_their_order():
    parts = [{"type": kind, "text": "1"} for kind in ("python", "python", "python_output", "python_output")]
    messages = to_conversation({"messages": [USER, {"role": "assistant", "content": parts}]}, "f:1")["messages"]
    assert [len(message.get("tool_calls", [])) for message in messages] == [0, 2, 0, 0, 0]


def test_keys_without_a_value_are_not_missed():
    full = END | {"reasoning_content": "Hm.", "weight": 0, "audio": None, "refusal": ""}
    assert unread_keys([USER | {"name": "Ada"}, full, result("one", "a")]) == {"reasoning_content"}
    assert unread_keys([USER | {"weight": 1}]) == {"weight"}
