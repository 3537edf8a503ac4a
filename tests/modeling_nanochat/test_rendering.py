"""The chat template writes conversations with the ids and the mask of the original's renderer."""

import json
import re

import pytest
from golden import golden_json, golden_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from evals.tasks.table import to_conversation
from modeling_nanochat.convert.conversations import from_original, has_call_parts
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import SPECIAL_TOKENS
from recipes.training.data.chat_templates import render_one
from recipes.training.data.conversations import read_conversations

CONVERSATIONS = {conversation["name"]: conversation for conversation in golden_json("rendering.json")["conversations"]}
INVALID = {conversation["name"]: conversation["messages"] for conversation in golden_json("rendering.json")["invalid"]}
ALLOWED_HERE = "user_list_content"  # text parts are what the ecosystem sends as a user's content
CALL = {"type": "python", "text": "1+1"}
RESULT = {"type": "python_output", "text": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    return golden_tokenizer()


def converted(name: str) -> list[dict]:
    return from_original(CONVERSATIONS[name]["messages"], name)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_mask_are_the_originals(tokenizer, name):
    """Not one id differs, not even where a text spells control tokens: their escape leaves no token behind."""
    golden = CONVERSATIONS[name]
    ids, mask = render_one({"messages": converted(name)}, tokenizer)
    length = len(golden["ids"])  # the original cuts after 2,048
    assert len(ids) == golden.get("untruncated_length", length)
    assert ids[:length] == golden["ids"]
    assert mask[:length] == golden["mask"]


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name.startswith("specials_in_")])
def test_spelled_control_tokens_are_among_the_golden_conversations(name):
    assert any(token in str(CONVERSATIONS[name]["messages"]) for token in SPECIAL_TOKENS)


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if "completion_ids" in CONVERSATIONS[name]])
def test_the_prompt_for_the_last_reply_is_the_originals(tokenizer, name):
    prompt = from_original(CONVERSATIONS[name]["messages"][:-1], name)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    golden = CONVERSATIONS[name]["completion_ids"]
    if name == "long_truncated":  # cut after 2,048 and then opened
        ids = [*ids[: len(golden) - 1], ids[-1]]
    assert ids == golden


@pytest.mark.parametrize("length", [1, 7, 64, 2048])
def test_a_long_conversation_is_cut_as_the_originals(tokenizer, length):
    golden = CONVERSATIONS["long_truncated"]
    rendered = tokenizer.apply_chat_template(
        golden["messages"], truncation=True, max_length=length, return_dict=True, return_assistant_tokens_mask=True
    )
    cut = "" if length == 2048 else f"_max_tokens_{length}"
    assert rendered["input_ids"] == golden[f"ids{cut}"]
    assert rendered["assistant_masks"] == golden[f"mask{cut}"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_rendered_stays_when_the_conversation_goes_on(tokenizer, name):
    """Cut before any message of a user or after any complete turn, the ids are a beginning of the whole's."""
    messages = converted(name)
    whole, _ = render_one({"messages": messages}, tokenizer)
    for end in range(1, len(messages)):
        ids = (
            tokenizer.apply_chat_template(messages[:end], return_dict=False)
            if messages[end - 1]["role"] != "system"
            else []
        )
        assert whole[: len(ids)] == ids
        if messages[end]["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True, return_dict=False)
            assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("name", [name for name in INVALID if name != ALLOWED_HERE])
def test_what_the_original_refuses_is_refused(name):
    with pytest.raises(UserError, match=r"^data\.jsonl:7"):
        to_conversation({"messages": INVALID[name]}, "data.jsonl:7")


def test_a_users_text_parts_are_accepted(tokenizer):
    messages = to_conversation({"messages": INVALID[ALLOWED_HERE]}, "here")["messages"]
    as_string = [{"role": "user", "content": "a"}, *messages[1:]]
    assert render_one({"messages": messages}, tokenizer) == render_one({"messages": as_string}, tokenizer)


@pytest.mark.parametrize("golden", golden_json("rendering.json")["encode"], ids=lambda case: repr(case["text"][:20]))
def test_plain_text_is_encoded_as_the_originals(tokenizer, golden):
    ids = tokenizer(golden["text"], split_special_tokens=True).input_ids
    assert ids == [tokenizer.bos_token_id, *golden["ids"]]


def test_calls_become_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, CALL, RESULT, CALL, CALL, RESULT, RESULT]
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+1"}}}
    result = {"role": "tool", "name": "python", "content": "2"}
    assert from_original([{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}], "here") == [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "tool_calls": [call],
        },
        result,
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        result,
        result,
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([CALL], "last `python` has no"),
        ([CALL, {"type": "text", "text": "so"}], "part 2: the `python` before it"),
        ([RESULT], "part 1: a `python_output` without"),
        ([{"type": "text", "text": "a"}, RESULT], "part 2: a `python_output` without"),
        ([CALL, RESULT, {"type": "image", "text": "x"}], "part 3: unknown type 'image'"),
        ([CALL, RESULT, {"type": "text", "text": None}], "part 3: expected an object"),
        ([CALL, RESULT, "text"], "part 3: expected an object"),
    ],
)
def test_parts_in_disorder_are_refused(parts, words):
    with pytest.raises(UserError, match=f"^f:1, message 2.*{words}"):
        to_conversation(
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}, "f:1"
        )


def test_only_an_assistant_calls():
    with pytest.raises(UserError, match="f:1, message 1: only an assistant"):
        to_conversation({"messages": [{"role": "user", "content": [CALL, RESULT]}]}, "f:1")


PARTS = st.lists(st.sampled_from([{"type": "text", "text": "so "}, CALL, RESULT]), max_size=7)


@given(PARTS)
def test_every_list_of_parts_is_converted_or_refused(tokenizer, parts):
    """The control tokens of what is converted are those of the parts, in their order."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]
    try:
        conversation = to_conversation({"messages": messages}, "f:1")
    except UserError:
        assert has_call_parts(messages)
        return
    text = tokenizer.decode(render_one(conversation, tokenizer)[0])
    written = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    turn = "".join(written[part["type"]].format(part["text"]) for part in parts)
    assert text == f"<|bos|><|user_start|>?<|user_end|><|assistant_start|>{turn}<|assistant_end|>"


TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "Finds <|bos|>.", "parameters": {}}}]


def test_tools_of_a_record_are_written_before_the_first_question(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!"},
    ]
    text = tokenizer.decode(render_one(to_conversation({"messages": messages, "tools": TOOLS}, "here"), tokenizer)[0])
    listed = '{"name": "lookup", "description": "Finds <|bos|>.", "parameters": {}}'
    assert text.startswith(f"<|bos|><|user_start|>Functions in Python:\n{listed}\n\nBe brief.\n\n?<|user_end|>")


def test_half_a_character_in_a_tools_description_is_read_as_a_replacement_character(tokenizer):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids, _ = render_one(
        {"messages": messages, "tools": [{"function": {"name": "f", "description": "\ud800"}}]}, tokenizer
    )
    assert '"description": "\ufffd"' in tokenizer.decode(ids)


def test_python_itself_is_not_listed(tokenizer):
    messages = [{"role": "user", "content": "?"}]
    python = [{"type": "function", "function": {"name": "python", "description": "Runs code.", "parameters": {}}}]
    assert tokenizer.apply_chat_template(messages, tools=python) == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("tools", ["lookup", [{"function": {}}], [3], 3, True, {}, 0, ""])
def test_malformed_tools_are_refused(tools):
    with pytest.raises(UserError, match="f:1: `tools` must be a list"):
        to_conversation({"messages": [{"role": "user", "content": "?"}], "tools": tools}, "f:1")


def calling(*functions: dict) -> list[dict]:
    calls = [{"type": "function", "function": function} for function in functions]
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ({"name": "python", "arguments": {}}, "needs `arguments` {code: string}"),
        ({"name": "python", "arguments": {"code": None}}, "needs `arguments` {code: string}"),
        ({"name": "python", "arguments": {"code": ["1"]}}, "needs `arguments` {code: string}"),
        ({"name": "python", "arguments": {"code": "1", "timeout": 3}}, "needs `arguments` {code: string}"),
        ({"name": "python", "arguments": '{"code": "1"}'}, "an object, not a JSON string"),
        ({"name": "get-time", "arguments": {}}, "'get-time' is not a Python name"),
        ({"name": "now", "arguments": {"from": 1}}, "'from' is not a Python name"),
        ({"name": "", "arguments": {}}, "'' is not a Python name"),
    ],
)
def test_calls_that_cannot_be_written_are_refused(function, words):
    with pytest.raises(UserError, match=f"^f:1, message 2: .*{re.escape(words)}"):
        to_conversation({"messages": calling(function)}, "f:1")


def test_the_forms_that_calls_come_in(tokenizer):
    """Nested as OpenAI has them, flat, and with the keys that a table fills with None."""
    nested = calling({"name": "python", "arguments": {"code": "1+1", "city": None}})
    flat = [
        nested[0],
        nested[1] | {"tool_calls": [{"function": None, "name": "python", "arguments": {"code": "1+1"}}]},
    ]
    first, second = (
        render_one(to_conversation({"messages": messages}, "f:1"), tokenizer) for messages in (nested, flat)
    )
    assert first == second and "<|python_start|>1+1<|python_end|>" in tokenizer.decode(first[0])


def test_a_question_ends_the_turn_that_an_unanswered_call_left_open(tokenizer):
    messages = [*calling({"name": "python", "arguments": {"code": "1"}}), {"role": "user", "content": "!"}]
    text = tokenizer.decode(tokenizer.apply_chat_template(messages, return_dict=False))
    assert text.endswith("<|python_start|>1<|python_end|><|assistant_end|><|user_start|>!<|user_end|>")
    with pytest.raises(UserError, match="message 3: role 'user' is out of order, expected tool"):
        to_conversation({"messages": messages}, "f:1")
    with pytest.raises(UserError, match="message 4: role 'user' is out of order, expected assistant or tool"):
        to_conversation({"messages": [*messages[:2], {"role": "tool", "content": "1"}, messages[2]]}, "f:1")


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_only_an_assistants_message_has_calls(role):
    messages = [*calling({"name": "python", "arguments": {"code": "1"}})[: 2 if role == "tool" else 0]]
    with pytest.raises(UserError, match=f"only an assistant message can have `tool_calls`, not role '{role}'"):
        to_conversation({"messages": [*messages, calling({"name": "f", "arguments": {}})[1] | {"role": role}]}, "f:1")


def test_a_developers_message_is_a_system_message(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "!"},
    ]
    ids = render_one(to_conversation({"messages": messages}, "f:1"), tokenizer)
    messages[0] = {"role": "developer", "content": "Be brief."}
    assert render_one(to_conversation({"messages": messages}, "f:1"), tokenizer) == ids


def test_the_older_form_of_calls_is_not_lost_silently():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]
    with pytest.raises(UserError, match="write it as one of `tool_calls`"):
        to_conversation({"messages": messages}, "f:1")
    messages[1] = {"role": "assistant", "content": [CALL, RESULT], "tool_calls": [{}]}
    with pytest.raises(UserError, match="not both"):
        to_conversation({"messages": messages}, "f:1")


@pytest.mark.parametrize("messages", [3, True, 1.5, None, "text", {"role": "user"}])
def test_messages_of_another_type_are_refused(messages):
    with pytest.raises(UserError, match="f:1: `messages` must be a non-empty list"):
        to_conversation({"messages": messages}, "f:1")


def test_a_file_of_the_originals_trains_as_it_is(tmp_path):
    """One array of messages a line, which is how the original writes custom conversations."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (tmp_path / "identity.jsonl").write_text(json.dumps(messages) + "\n" + json.dumps({"messages": messages}) + "\n")
    assert read_conversations([str(tmp_path / "identity.jsonl")]) == [{"messages": messages}] * 2


ARGUMENTS = {"city": 'P"a<|bos|>', "days": 3, "wet": True, "no": None, "deep": {"k": [1.5, False]}}


def test_another_functions_call_is_a_call_in_python(tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    question = [{"role": "user", "content": "?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    messages = [*question, {"role": "assistant", "content": " Hm.\n", "tool_calls": [call]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    parsed = tokenizer.parse_response(ids[len(prompt) :], prefix=prompt)
    (parsed_call,) = parsed["tool_calls"]
    assert parsed["content"] == " Hm.\n" and parsed_call["function"]["name"] == "python"
    code = parsed_call["function"]["arguments"]["code"]
    assert eval(code, {"weather": lambda **given: given}) == ARGUMENTS
    assert tokenizer.apply_chat_template([*question, parsed], return_dict=False) == ids


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "system", "content": "s"}], "a user message must follow"),
        ([{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "a user message must follow"),
        ([{"role": "user", "content": {"text": "b"}}], "list of text parts"),
        ([{"role": "user", "content": [{"type": "image", "url": "b"}]}], "only text content parts"),
        ([{"role": "user", "content": 3}], "list of text parts"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only text content parts"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "only text content parts"),
        ([{"role": "user", "content": "?"}, {"role": "tool", "content": "4"}], "must follow a call"),
        (calling({"name": "python", "arguments": {"code": 5}}), "code of a call"),
        (calling({"name": "python", "arguments": {"code": None}}), "code of a call"),
        (calling({"name": "python", "arguments": {"city": None}}), "code of a call"),
        (
            calling({"name": "python", "arguments": {"expression": "1+1"}}),
            "code as the argument 'code' and no other, not 'expression'",
        ),
        (calling({"name": "python", "arguments": {"code": "1", "timeout": 3}}), "no other, not 'timeout'"),
        (calling({"name": "python", "arguments": '{"code": "5"}'}), "not a JSON string"),
        (calling({"name": "python"}), "arguments must be a dict"),
        (calling({"arguments": {"code": "5"}}), "call has no name"),
        (calling({"name": "", "arguments": {"code": "5"}}), "call has no name"),
        (
            [{"role": "assistant", "tool_calls": {"name": "python", "arguments": {"code": "5"}}}],
            "tool_calls must be a list",
        ),
        ([{"role": "assistant", "tool_calls": "5"}], "tool_calls must be a list"),
        (
            [{"role": "user", "content": "?", "tool_calls": [{"name": "f", "arguments": {}}]}],
            "only a message of the assistant",
        ),
        ([{"role": "assistant", "content": "a", "function_call": {"name": "f"}}], "function_call is not read"),
        ([{"role": "assistant", "content": 0}], "list of text parts"),
        ([{"role": "assistant", "content": {}}], "list of text parts"),
        ([{"role": "stranger", "content": "b"}], "unknown role"),
    ],
)
def test_the_template_loses_nothing_silently(tokenizer, messages, words):
    with pytest.raises(Exception, match=words):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("tools", [[{"type": "function", "function": {"parameters": {}}}], [{"name": None}]])
def test_a_tool_without_a_name_is_not_listed_silently(tokenizer, tools):
    with pytest.raises(Exception, match="functions with a name"):
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tools=tools)


def test_documents_are_not_dropped_silently(tokenizer):
    with pytest.raises(Exception, match="documents are not read"):
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], documents=[{"title": "a", "text": "b"}])


def test_what_trl_renders_to_see_what_follows_a_call_is_an_empty_call(tokenizer):
    text = tokenizer.decode(
        tokenizer.apply_chat_template(calling({"name": "python", "arguments": {}}), return_dict=False)
    )
    assert text.endswith("<|assistant_start|><|python_start|><|python_end|>")
