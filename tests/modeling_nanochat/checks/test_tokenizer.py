import json

import pytest
from other_models import CHATML, chatml_llama
from transformers import PreTrainedTokenizerFast

from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import check_folder, load_model_and_tokenizer
from modeling_nanochat.tokenization_nanochat import RESPONSE_TEMPLATE, SPLIT_PATTERNS
from tokenizer_train.bpe import train_tokenizer


def change(folder, file="tokenizer.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder, opening=check_folder):
    with pytest.raises(UserError) as error:
        opening(folder, "me/toy")
    assert "\n" not in str(error.value) and str(error.value).startswith("me/toy: ")
    return str(error.value)


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(old, new):
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(kind, parts):
    return {"type": "Sequence", kind: parts}


PADDING = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"pre_tokenizer": split({"Regex": r"(?:\p{L}+)+[0-9]"})}, "no bound on time"),
        ({"pre_tokenizer": split({"Regex": r"[\s\S]*[\s\S]*\x00"})}, "no bound on time"),
        ({"pre_tokenizer": split({"Regex": "(a+"})}, "no bound on time"),
        ({"pre_tokenizer": split({"Regex": {}})}, "no bound on time"),
        ({"normalizer": replace({"Regex": ""}, "a")}, "no bound on time"),
        ({"normalizer": replace({"String": ""}, "a")}, "searches for an empty text"),
        ({"decoder": sequence("decoders", [replace({"Regex": "(a|a)+b"}, "")])}, "no bound on time"),
        ({"normalizer": sequence("normalizers", [replace({"String": "a"}, "a" * 9)] * 2)}, "64 times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 99}}, "64 times longer"),
        ({"decoder": sequence("decoders", [replace({"String": "a"}, "a" * 9)] * 2)}, "64 times longer"),
        ({"pre_tokenizer": sequence("pretokenizers", [{"type": "Whitespace"}] * 1000)}, "20,000 characters"),
        ({"post_processor": {"single": [{"SpecialToken": {"id": "a"}}] * 1000}}, "20,000 characters"),
        ({"padding": PADDING | {"strategy": {"Fixed": 10**9}, "pad_to_multiple_of": None}}, "pads to more"),
        ({"padding": PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}}, "pads to more"),
        ({"model": {"type": "BPE", "vocab": {"a" * 10_001: 0}, "merges": []}}, "10,000 characters"),
        ({"model": {"type": "Unigram", "vocab": [["a" * 10_001, 0.0]]}}, "10,000 characters"),
        ({"model": ["a"]}, "not a tokenizer's"),
        ({"added_tokens": [ADDED | {"id": i, "content": f"<{i}>"} for i in range(20_001)]}, "adds 20,001 tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_tokenizer_without_bounds_is_not_opened(toy_model_folder, part, message):
    change(toy_model_folder, **part)
    assert message in refusal(toy_model_folder)


def test_a_tokenizer_json_without_a_model_is_one_line(toy_model_folder):
    change(toy_model_folder, model=[])
    assert "the tokenizer cannot be opened" in refusal(toy_model_folder, load)


def load(folder, name):
    try:
        load_model_and_tokenizer(folder, device="cpu")
    except UserError as error:
        raise UserError(str(error).replace(str(folder), name)) from error


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_every_pattern_that_we_train_with_is_known(toy_model_folder, pattern):
    train_tokenizer(["The cat sat on the mat."], 280, split_pattern=pattern).save_pretrained(toy_model_folder)
    check_folder(toy_model_folder, "me/toy")


def test_nesting_without_end_is_one_line(toy_model_folder):
    (toy_model_folder / "tokenizer.json").write_text("[" * 10**6)
    assert "tokenizer.json cannot be opened" in refusal(toy_model_folder)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "fast_tokenizer_files", "tokenizer_object"])
def test_settings_lead_to_no_other_file(toy_model_folder, key):
    change(toy_model_folder, "tokenizer_config.json", **{key: "/dev/zero"})
    assert f"`{key}`, which leads to another file" in refusal(toy_model_folder)


@pytest.mark.parametrize(
    "settings",
    [{"bos_token": 5}, {"model_max_length": "x"}, {"padding_side": "up"}, {"chat_template": 5}],
    ids=str,
)
def test_a_setting_of_a_wrong_type_is_one_line(toy_model_folder, settings):
    (toy_model_folder / "chat_template.jinja").unlink()
    change(toy_model_folder, "tokenizer_config.json", **settings)
    refusal(toy_model_folder, load)


def test_replies_are_parsed_by_our_own_patterns(toy_model_folder):
    hostile = RESPONSE_TEMPLATE | {"start_anchor_pattern": "(a|a)+b"}
    change(toy_model_folder, "tokenizer_config.json", response_template=hostile)
    assert load_model_and_tokenizer(toy_model_folder, device="cpu")[1].response_template == RESPONSE_TEMPLATE


def test_other_people_s_patterns_for_replies_are_not_run(tmp_path):
    folder = chatml_llama(tmp_path / "model")
    change(folder, "tokenizer_config.json", response_template=RESPONSE_TEMPLATE | {"start_anchor_pattern": "(a|a)+b"})
    tokenizer = load_model_and_tokenizer(folder, device="cpu")[1]
    assert tokenizer.response_template is None
    tokenizer.save_pretrained(tmp_path / "saved")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").chat_template == CHATML


def swap(folder, one, other):
    """Exchange two control tokens, whose ids the library counts in their order."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    for token in tokens:
        token["content"] = {one: other, other: one}.get(token["content"], token["content"])
    change(folder, added_tokens=tokens)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<|bos|>", "<|user_start|>"),
        ("<|assistant_end|>", "<|user_end|>"),
        ("<|python_end|>", "<|python_start|>"),
    ],
)
def test_control_tokens_with_other_ids_than_in_training_are_refused(toy_model_folder, one, other):
    swap(toy_model_folder, one, other)
    assert "not from the same training" in refusal(toy_model_folder, load)


def test_an_id_beyond_the_vocabulary_is_refused(toy_model_folder):
    model = json.loads((toy_model_folder / "tokenizer.json").read_text())["model"]
    change(toy_model_folder, model=model | {"vocab": model["vocab"] | {"zq": 10**6}})
    assert "has 1000001 tokens, the model only 320" in refusal(toy_model_folder, load)


def test_the_class_that_the_folder_names_is_not_asked(toy_model_folder):
    change(toy_model_folder, "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer")
    assert type(load_model_and_tokenizer(toy_model_folder, device="cpu")[1]) is PreTrainedTokenizerFast


@pytest.mark.parametrize("ids", [{"bos_token_id": None, "eos_token_id": None}, {"bos_token_id": 0, "eos_token_id": 1}])
def test_ids_that_were_never_set_are_no_mismatch(toy_model_folder, ids):
    change(toy_model_folder, "config.json", **ids)
    load_model_and_tokenizer(toy_model_folder, device="cpu")
