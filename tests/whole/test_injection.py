"""No text in a conversation becomes a control token, and none is lost. With a plain `AutoTokenizer`, as users have."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import Dataset, load_dataset
from golden import golden_tokenizer
from hostile import (
    ANY,
    NESTED,
    PIECES,
    SPELLED,
    UNSPELLED,
    contents,
    conversations,
    learnt,
    messages_of,
    part,
    read,
    rendered,
    whole,
    written,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    has_generation_markers,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from modeling_nanochat.tokenization_nanochat import (
    ESCAPE,
    SPECIAL_TOKENS,
    SPLIT_PATTERNS,
    build_tokenizer,
    encode_documents,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    golden_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__module__.startswith("transformers.")
    return tokenizer


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(conversations(ANY))
def test_control_tokens_are_the_templates_and_texts_come_back(tokenizer, conversation):
    """Also the mask: of what escapes leave at the edges, nothing is learnt or missed."""
    messages = messages_of(conversation)
    result = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = result["input_ids"], result["assistant_masks"]
    assert read(tokenizer, ids) == written(conversation)
    assert tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on]) == learnt(conversation)


@settings(max_examples=100, deadline=None)
@given(conversations(ANY))
def test_prefixes_are_preserved(tokenizer, conversation):
    messages = messages_of(conversation)
    ids = rendered(tokenizer, messages)
    for end in range(1, len(messages)):
        if messages[end - 1]["role"] != "system":
            beginning = rendered(tokenizer, messages[:end], add_generation_prompt=messages[end]["role"] == "assistant")
            assert ids[: len(beginning)] == beginning


@settings(max_examples=100, deadline=None)
@given(conversations(ANY, UNSPELLED))
def test_replies_are_parsed_to_the_character(tokenizer, conversation):
    """Whatever comes before. Only in the reply: `parse_response` decodes, then spelled tokens look like real ones."""
    messages = messages_of(conversation)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = rendered(tokenizer, messages[:i], add_generation_prompt=True)
            reply = rendered(tokenizer, messages[: i + 1])[len(prompt) :]
            parsed = tokenizer.parse_response(reply, prefix=prompt)
            assert parsed.get("content", "") == whole(message["content"])
            calls = message.get("tool_calls", [])  # one without code is none, for the engine too
            assert parsed.get("tool_calls", []) == [call for call in calls if call["function"]["arguments"]["code"]]


@given(st.lists(conversations(ANY), min_size=2, max_size=3))
@settings(max_examples=50, deadline=None)
def test_rendered_in_a_batch_padded_and_cut(tokenizer, batch):
    many = [messages_of(conversation) for conversation in batch]
    padded = tokenizer.apply_chat_template(many, padding=True, return_dict=True)
    alone = [rendered(tokenizer, messages) for messages in many]
    assert [ids[-len(one) :] for ids, one in zip(padded["input_ids"], alone, strict=True)] == alone
    cut = tokenizer.apply_chat_template(many, truncation=True, max_length=30, return_dict=True)
    assert cut["input_ids"] == [one[:30] for one in alone]


@settings(max_examples=100, deadline=None)
@given(conversations(ANY))
def test_rendered_to_text_and_encoded_afterwards(tokenizer, conversation):
    """As TRL, vLLM and others do it, also when the text was kept in a file meanwhile."""
    messages = messages_of(conversation)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for kept in (text, json.loads(json.dumps(text)), json.loads(json.dumps(text, ensure_ascii=False).encode())):
        assert tokenizer(kept, add_special_tokens=False).input_ids == rendered(tokenizer, messages)


def test_rendered_text_survives_arrow_and_parquet(tokenizer, tmp_path):
    many = [[{"role": "user", "content": text}] for text in [*SPECIAL_TOKENS, *NESTED, *PIECES]]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in many]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "texts.parquet")
    opened = load_dataset("parquet", data_files=str(tmp_path / "texts.parquet"), cache_dir=str(tmp_path))["train"]
    ids = opened.map(lambda row: tokenizer(row["text"], add_special_tokens=False))["input_ids"]
    assert list(ids) == [rendered(tokenizer, messages) for messages in many]


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
@settings(max_examples=50, deadline=None)
@given(conversations(ANY))
def test_with_every_split_pattern(tokenizer, pattern, conversation):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    other = build_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], 2048, pattern)
    assert read(other, rendered(other, messages_of(conversation))) == written(conversation)


VALUES = st.recursive(
    ANY | st.integers() | st.booleans() | st.none(),
    lambda value: st.lists(value, max_size=2) | st.dictionaries(ANY, value, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ANY, ANY, VALUES), min_size=1, max_size=2), ANY, ANY)
def test_tool_descriptions(tokenizer, functions, system, question):
    schemas = [
        {"name": f"f{name}", "description": words, "parameters": {words: value}} for name, words, value in functions
    ]
    tools = [{"type": "function", "function": schema} for schema in schemas]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    lines = "".join(json.dumps(schema, ensure_ascii=False) + "\n" for schema in schemas)
    text = f"Functions in Python:\n{lines}\n{system}\n\n{question}"
    expected = [("<|bos|>", ""), ("<|user_start|>", text), ("<|user_end|>", "")]
    assert read(tokenizer, rendered(tokenizer, messages, tools=tools)) == expected


@settings(max_examples=100, deadline=None)
@given(ANY, st.dictionaries(ANY, ANY | st.lists(ANY, max_size=2), max_size=2))
def test_calls_of_other_functions(tokenizer, name, arguments):
    """Names of messages and ids of calls are not rendered at all."""
    function = {"name": f"f{name}", "arguments": arguments}
    messages = [
        {"role": "user", "name": name, "content": ""},
        {"role": "assistant", "name": name, "tool_calls": [{"type": name, "id": name, "function": function}]},
        {"role": "tool", "name": name, "tool_call_id": name, "content": name},
    ]
    given_ = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    pieces = read(tokenizer, rendered(tokenizer, messages))
    assert pieces[4:6] == [("<|python_start|>", f"f{name}({given_})"), ("<|python_end|>", "")]
    assert pieces[6:] == [("<|output_start|>", name), ("<|output_end|>", "")]


@pytest.mark.parametrize("role", ["<|bos|>", "user<|bos|>", "user ", "User", "python"])
def test_a_role_is_one_of_the_templates(tokenizer, role):
    with pytest.raises(Exception, match="unknown role"):
        rendered(tokenizer, [{"role": role, "content": ""}])


@settings(max_examples=100, deadline=None)
@given(contents(ANY), UNSPELLED.filter(lambda text: f"<|{ESCAPE}" not in text), ANY)
def test_a_reply_to_be_continued(tokenizer, question, begun, text):
    """A string that the template escapes cannot be continued, see below; a list whose last part is empty can."""
    for content in (begun.rstrip() + ".", [part(text), part("")]):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        pieces = read(tokenizer, rendered(tokenizer, messages, continue_final_message=True))
        assert pieces[1:] == [
            ("<|user_start|>", whole(question)),
            ("<|user_end|>", ""),
            ("<|assistant_start|>", whole(content)),
        ]


def test_an_escaped_reply_is_not_continued_as_a_string(tokenizer):
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a<|bos|>"}]
    with pytest.raises(ValueError, match="does not appear in the chat"):
        rendered(tokenizer, messages, continue_final_message=True)


@settings(max_examples=50, deadline=None)
@given(conversations(ANY))
def test_transformers_own_remedy_changes_nothing(tokenizer, conversation):
    """Versions without it take the word for a variable of the template, and write the same as well."""
    messages = messages_of(conversation)
    assert rendered(tokenizer, messages, sanitize_control_tokens=True) == rendered(tokenizer, messages)


@settings(max_examples=500, deadline=None)
@given(ANY)
def test_raw_text(tokenizer, text):
    """`split_special_tokens` keeps control tokens out; without it they are read, as rendering to text needs."""
    bos, *ids = tokenizer(text, split_special_tokens=True).input_ids
    assert bos == tokenizer.bos_token_id and not set(ids) & set(tokenizer.get_added_vocab().values())
    read_as = [name for name, _ in read(tokenizer, tokenizer(text).input_ids)]
    assert read_as == ["<|bos|>", *SPELLED.findall(text)]


@settings(max_examples=500, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=3))
def test_documents(tokenizer, documents):
    encoded = encode_documents(tokenizer, documents)
    assert [read(tokenizer, ids) for ids in encoded] == [[("<|bos|>", document)] for document in documents]


def test_control_tokens_of_others_stay_out_of_documents(folder):
    extended = AutoTokenizer.from_pretrained(folder)
    extended.add_special_tokens({"extra_special_tokens": ["[IMAGE]"]})
    assert read(extended, encode_documents(extended, ["[IMAGE]<|bos|>"])[0]) == [("<|bos|>", "[IMAGE]<|bos|>")]


def test_raw_text_loses_an_own_escape(tokenizer):
    """U+FDD0, a noncharacter, right behind `<|`; `encode_documents` and the template keep it."""
    ids = tokenizer(f"{ESCAPE}<|{ESCAPE}{ESCAPE}<|{ESCAPE}|>", split_special_tokens=True).input_ids
    assert tokenizer.decode(ids[1:]) == f"{ESCAPE}<|{ESCAPE}"


def test_a_tokenizer_that_never_reads_control_tokens_cannot_render(folder, tokenizer):
    """Opened with `split_special_tokens=True`, for text alone: the template's own tokens become text as well."""
    disable_special_tokens = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    control = set(tokenizer.get_added_vocab().values())
    assert not control & set(disable_special_tokens("a<|bos|>").input_ids[1:])
    assert not control & set(rendered(disable_special_tokens, [{"role": "user", "content": "a"}]))


def test_encoding_text_alone_leaves_no_trace(tokenizer):
    messages = [{"role": "user", "content": "<|bos|>"}]
    before = rendered(tokenizer, messages), tokenizer("<|bos|>").input_ids
    tokenizer("<|bos|>", split_special_tokens=True)
    assert (rendered(tokenizer, messages), tokenizer("<|bos|>").input_ids) == before


def test_threads_that_render_and_encode_documents_do_not_meet(tokenizer):
    """`split_special_tokens` is state of the tokenizer; neither of the two sets it."""
    messages = [{"role": "user", "content": "<|bos|>"}]
    ids, document = rendered(tokenizer, messages), encode_documents(tokenizer, ["<|bos|>" * 50])
    with ThreadPoolExecutor(2) as pool:
        renders = pool.submit(lambda: [rendered(tokenizer, messages) for _ in range(1500)])
        encodes = pool.submit(lambda: [encode_documents(tokenizer, ["<|bos|>" * 50]) for _ in range(1500)])
    assert all(result == ids for result in renders.result())
    assert all(result == document for result in encodes.result())


@pytest.mark.parametrize(
    "check", [supports_tool_calling, is_chat_template_prefix_preserving, is_chat_template_stop_token_trained]
)
def test_trl_finds_what_it_needs(tokenizer, check):
    assert check(tokenizer)


def test_trl_finds_what_is_learnt(tokenizer):
    assert has_generation_markers(tokenizer.chat_template)
