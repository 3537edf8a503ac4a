import copy
import json

import pytest
from golden import golden_json
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import (
    SPECIAL_TOKENS,
    byte_symbols,
    encode_documents,
    save_tokenizer,
    special_token_ids,
)
from tokenizer_train.bpe import train_tokenizer

CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "2+2"}}}
TOOL_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "Hm. ", "tool_calls": [CALL]},
    {"role": "tool", "name": "python", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


@pytest.fixture(scope="module")
def tokenizer(toy_model_and_tokenizer):
    return toy_model_and_tokenizer[1]


def test_training_gives_the_originals_vocabulary():
    golden = golden_json("bpe_vocab.json")
    tokenizer = train_tokenizer(golden["training_docs"], golden["vocab_size"])
    position = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokens = tokenizer.convert_ids_to_tokens(range(491))
    assert [bytes(position[symbol] for symbol in token).hex() for token in tokens] == golden["tokens_hex"][:491]
    assert tuple(tokenizer.convert_ids_to_tokens(range(491, 500))) == SPECIAL_TOKENS


def test_special_tokens_come_last_and_survive_a_save(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert list(special_token_ids(opened).values()) == list(range(len(opened) - 9, len(opened)))
    assert (opened.bos_token, opened.eos_token, opened.padding_side) == ("<|bos|>", "<|assistant_end|>", "left")
    assert opened.chat_template == tokenizer.chat_template


def test_the_template_is_saved_where_each_library_looks_for_it(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (
        config["chat_template"]
        == (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
        == tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path / "alone")
    assert config.pop("chat_template") and config == json.loads(
        (tmp_path / "alone" / "tokenizer_config.json").read_text()
    )


def test_several_templates_and_none_are_saved_as_well(tokenizer, tmp_path):
    tokenizer = copy.copy(tokenizer)
    for template in ({"default": "a", "tool_use": "b"}, None):
        tokenizer.chat_template = template
        save_tokenizer(tokenizer, tmp_path / str(template is None))
        assert AutoTokenizer.from_pretrained(tmp_path / str(template is None)).chat_template == template


@given(st.text())
def test_every_text_comes_back(tokenizer, text):
    ids = encode_documents(tokenizer, [text])[0]
    assert tokenizer.decode(ids[1:]) == text.encode("utf-8", "replace").decode()


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", " ", "x"])).map("".join))
def test_no_text_becomes_a_control_token(tokenizer, text):
    control = set(special_token_ids(tokenizer).values())
    assert not control & set(encode_documents(tokenizer, [text])[0][1:])
    empty = tokenizer.apply_chat_template([{"role": "user", "content": ""}], return_dict=True)["input_ids"]
    for role in ("user", "tool"):
        messages = [{"role": "user", "content": text if role == "user" else ""}]
        if role == "tool":
            messages += [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": text}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        count = sum(token in control for token in ids)
        assert count == (len(empty) if role == "user" else len(empty) + 5)


def test_template_marks_what_the_assistant_wrote(tokenizer):
    rendered = tokenizer.apply_chat_template(TOOL_CHAT, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learnt) == "Hm. <|python_start|>2+2<|python_end|>It is 4.<|assistant_end|>"
    assert tokenizer.decode(rendered["input_ids"]) == (
        "<|bos|><|user_start|>Be brief.\n\n2+2?<|user_end|><|assistant_start|>Hm. <|python_start|>2+2<|python_end|>"
        "<|output_start|>4<|output_end|>It is 4.<|assistant_end|>"
    )


def test_trl_can_work_with_the_template(tokenizer):
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)


def test_a_call_and_what_follows_its_result_are_parsed(tokenizer):
    prompt = tokenizer.apply_chat_template(TOOL_CHAT[1:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = special_token_ids(tokenizer)
    code = tokenizer("2+2", add_special_tokens=False)["input_ids"]
    call = [ids["<|python_start|>"], *code, ids["<|python_end|>"]]
    parsed = tokenizer.parse_response(call, prefix=prompt)
    assert parsed["tool_calls"][0]["function"]["arguments"] == {"code": "2+2"}
    after = tokenizer.apply_chat_template(TOOL_CHAT[1:4], add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = [*tokenizer("It is 4.", add_special_tokens=False)["input_ids"], ids["<|assistant_end|>"]]
    assert tokenizer.parse_response(answer, prefix=after) == {"role": "assistant", "content": "It is 4."}


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="265"):
        train_tokenizer(["text"], 264)


def test_a_strange_tokenizer_is_refused(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    strange = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(
            tokenizer.backend_tokenizer.to_str().replace("<|user_start|>", "<|strange|>")
        )
    )
    with pytest.raises(UserError, match="user_start"):
        special_token_ids(strange)
