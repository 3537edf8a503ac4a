import copy
import json
import shutil
from logging import Handler

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from modeling_nanochat.chat.examples import training_stage
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import first_not_finite, load_model_and_tokenizer, pick_device
from tokenizer_train.bpe import train_tokenizer


def test_a_folder_comes_back_with_equal_logits(toy_model_folder, toy_model_and_tokenizer):
    model, tokenizer = load_model_and_tokenizer(toy_model_folder, device="cpu")
    ids = torch.tensor([tokenizer("Who are you?")["input_ids"]])
    assert isinstance(model, NanoChatForCausalLM)
    assert not model.training
    assert torch.equal(model(ids).logits, toy_model_and_tokenizer[0](ids).logits)


def test_dtype_is_float32_on_cpu_unless_asked(toy_model_and_tokenizer, tmp_path):
    model, tokenizer = toy_model_and_tokenizer
    tokenizer.save_pretrained(tmp_path)
    NanoChatForCausalLM(model.config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model_and_tokenizer(tmp_path, device="cpu")[0].dtype == torch.float32
    assert load_model_and_tokenizer(tmp_path, device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device, has_bfloat16, dtype, expected",
    [
        ("cuda", True, None, torch.bfloat16),
        ("cuda", False, None, torch.float32),
        ("cuda", True, torch.float32, torch.float32),
        ("mps", True, None, torch.float32),
        ("cpu", True, None, torch.float32),
    ],
)
def test_a_float32_folder_is_bfloat16_where_a_gpu_has_that(
    device, has_bfloat16, dtype, expected, toy_model_and_tokenizer, tmp_path, monkeypatch
):
    for part in toy_model_and_tokenizer:
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: model)  # which is not there
    assert load_model_and_tokenizer(tmp_path, device=device, dtype=dtype)[0].dtype == expected


def test_pick_device_is_usable():
    assert torch.zeros(1, device=pick_device()).sum() == 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no model.safetensors"),
        ("tokenizer.json", "has no tokenizer.json; copy"),
    ],
)
def test_an_incomplete_folder_says_what_it_lacks(toy_model_folder, missing, message):
    (toy_model_folder / missing).unlink()
    with pytest.raises(UserError, match=message) as error:
        load_model_and_tokenizer(toy_model_folder)
    assert str(toy_model_folder) in str(error.value)


def test_pickled_weights_are_not_opened(toy_model_folder):
    (toy_model_folder / "model.safetensors").unlink()
    torch.save({}, toy_model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not opened"):
        load_model_and_tokenizer(toy_model_folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "runs/pocket/sft", "plainname", "someone/somewhere"])
def test_a_name_that_leads_nowhere_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has left anything
    (tmp_path / "someone").mkdir()  # so that someone/somewhere is a path, and the Hub is not asked
    with pytest.raises(UserError, match="no such folder") as error:
        load_model_and_tokenizer(name)
    assert "\n" not in str(error.value)


def test_a_damaged_folder_is_one_line(toy_model_folder, tmp_path):
    for name, content in [("config.json", "{"), ("model.safetensors", "torn"), ("tokenizer.json", "{}")]:
        folder = tmp_path / name
        shutil.copytree(toy_model_folder, folder)
        (folder / name).write_text(content)
        with pytest.raises(UserError, match="cannot be opened") as error:
            load_model_and_tokenizer(folder)
        assert "\n" not in str(error.value)


@pytest.fixture(params=["whole", "sharded"])
def saved_model_folder(request, toy_model_folder, toy_model_and_tokenizer):
    """The toy model in one file, or in several with an index."""
    if request.param == "sharded":
        (toy_model_folder / "model.safetensors").unlink()
        toy_model_and_tokenizer[0].save_pretrained(toy_model_folder, max_shard_size="30KB")
        assert len(list(toy_model_folder.glob("model-*.safetensors"))) > 1
    return toy_model_folder


@pytest.fixture
def library_log():
    """What transformers warns of, which would stand around the one line."""
    records = []
    handler = Handler()
    handler.emit = records.append
    logging.add_handler(handler)
    yield records
    logging.remove_handler(handler)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(UserError) as error:
        load_model_and_tokenizer(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{folder}: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "they lack model.layers.2.mlp.fc1.weight and 5 more"),
        ({"num_hidden_layers": 1}, "config.json has no place for model.layers.1.mlp.fc1.weight and 5 more"),
        ({"vocab_size": 100}, "lm_head.weight is (320, 32), config.json says (100, 32)"),
        ({"vocab_size": 384}, "lm_head.weight is (320, 32), config.json says (384, 32)"),
        ({"num_key_value_heads": 2}, "k_proj.weight is (16, 32), config.json says (32, 32)"),
        ({"model_type": "nanochat_turbo"}, "they lack"),
    ],
    ids=str,
)
def test_weights_that_do_not_match_the_config_are_refused(saved_model_folder, change, message, library_log):
    change_config(saved_model_folder, **change)
    assert message in refusal(saved_model_folder)
    assert library_log == []


def test_keys_of_an_adapted_model_are_named(saved_model_folder, toy_model_and_tokenizer):
    state = {f"base_model.model.{name}": weight for name, weight in toy_model_and_tokenizer[0].state_dict().items()}
    for path in saved_model_folder.glob("model*"):
        path.unlink()
    save_file(state, saved_model_folder / "model.safetensors", metadata={"format": "pt"})
    assert "they lack lm_head.weight and" in refusal(saved_model_folder)


def test_a_tied_head_needs_no_weights_of_its_own(toy_model_and_tokenizer, tmp_path):
    model, tokenizer = toy_model_and_tokenizer
    tied = NanoChatForCausalLM(NanoChatConfig(**model.config.to_diff_dict() | {"tie_word_embeddings": True}))
    for part in (tied, tokenizer):
        part.save_pretrained(tmp_path)
    opened = load_model_and_tokenizer(tmp_path, device="cpu")[0]
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    change_config(tmp_path, tie_word_embeddings=False)
    assert "they lack lm_head.weight;" in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(value, dtype, toy_model_and_tokenizer, tmp_path):
    model, tokenizer = copy.deepcopy(toy_model_and_tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.fc2.weight[-1, -1] = value
    for part in (model.to(dtype), tokenizer):
        part.save_pretrained(tmp_path)
    assert "model.layers.1.mlp.fc2.weight has values that are not finite" in refusal(tmp_path)


def test_a_buffer_that_is_not_finite_is_named(toy_model_folder):
    change_config(toy_model_folder, rope_parameters={"rope_type": "default", "rope_theta": 0.0})
    assert "inv_freq has values that are not finite" in refusal(toy_model_folder)


def test_huge_weights_whose_sum_overflows_are_finite(toy_model_and_tokenizer):
    model = copy.deepcopy(toy_model_and_tokenizer[0])
    torch.nn.init.constant_(model.lm_head.weight, 1e38)
    assert first_not_finite(model) is None
    torch.nn.init.constant_(model.lm_head.weight, 60000.0)
    assert first_not_finite(model.half()) is None


@pytest.mark.parametrize(
    "config",
    [
        '{"hidden_size": "32"}',
        '{"dtype": "float3"}',
        '{"model_type": "no"}',
        '{"layer_types": 3}',
        "[]",
        "[" * 100_000,
    ],
    ids=lambda config: config[:30],
)
def test_a_config_of_which_no_model_can_be_built_is_one_line(toy_model_folder, config, library_log):
    path = toy_model_folder / "config.json"
    changed = json.loads(path.read_text()) | json.loads(config) if config.startswith("{") else None
    path.write_text(json.dumps(changed) if changed else config)
    assert "cannot be opened" in refusal(toy_model_folder)
    assert library_log == []


@pytest.mark.parametrize(
    "shard",
    [
        "pytorch_model.bin",
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        5,
    ],
)
def test_an_index_that_leads_elsewhere_or_to_pickle_is_refused(toy_model_folder, shard):
    """`torch.load` reading a pickle, or a path outside the folder being read, would end in another message."""
    weights = toy_model_folder / "model.safetensors"
    (toy_model_folder / "sub").mkdir()
    for place in (toy_model_folder.parent / "outside.safetensors", toy_model_folder / "sub" / "x.safetensors"):
        shutil.copy(weights, place)
    torch.save(load_file(weights), toy_model_folder / "pytorch_model.bin")
    names = load_file(weights)
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (toy_model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {str(shard)!r}; only safetensors inside the folder" in refusal(toy_model_folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}', "{"])
def test_a_broken_index_is_one_line(toy_model_folder, index):
    (toy_model_folder / "model.safetensors").unlink()
    (toy_model_folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(toy_model_folder)


def test_weights_under_another_name_are_refused(toy_model_folder):
    """The file could be an index, which nothing has checked."""
    change_config(toy_model_folder, transformers_weights="other.safetensors.index.json")
    assert "transformers_weights" in refusal(toy_model_folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_that_asks_for_code_from_the_hub_is_refused(toy_model_folder, key):
    change_config(toy_model_folder, **{key: "kernels-community/flash-attn2"})
    assert f"`{key}`, which runs code from the Hub" in refusal(toy_model_folder)
    change_config(toy_model_folder, **{key: "eager"})
    assert load_model_and_tokenizer(toy_model_folder, device="cpu")[0].config._attn_implementation == "eager"


def test_weights_may_be_linked(toy_model_folder):
    weights = toy_model_folder / "model.safetensors"
    weights.rename(toy_model_folder.parent / "blob")
    weights.symlink_to("../blob")
    load_model_and_tokenizer(toy_model_folder, device="cpu")


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_named_as_such_and_how_to_merge_it(toy_model_folder, whole):
    (toy_model_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    if not whole:
        (toy_model_folder / "config.json").unlink()
    message = refusal(toy_model_folder)
    assert "a PEFT adapter" in message and "merge_and_unload" in message


@pytest.mark.parametrize(
    ("card", "stage"),
    [
        ("---\ntags:\n- nanochat\n- base\n---\n# x", "base"),
        ("---\ntags: [nanochat, rl]\n---\n", "rl"),
        ("---\ntags: [base]\n---\n", None),
        ("---\ntags: nanochat\n---\n", None),
        ("---\ntags: [\n---\n", None),
        ("# only text", None),
        (None, None),
    ],
)
def test_the_card_knows_the_stage(toy_model_folder, card, stage, caplog):
    if card is not None:
        (toy_model_folder / "README.md").write_text(card)
    model, _ = load_model_and_tokenizer(toy_model_folder, device="cpu")
    assert training_stage(model.name_or_path) == stage
    assert not caplog.records


def test_a_model_from_no_folder_has_no_stage(toy_model_and_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\ntags: [nanochat, base]\n---\n")
    monkeypatch.chdir(tmp_path)
    assert training_stage(toy_model_and_tokenizer[0].name_or_path) is None


def test_a_tokenizer_of_another_training_is_refused(toy_model_folder):
    words = " ".join(f"{a}{b}{a} " for a in "abcdefghij" for b in "klmnopqrst")
    train_tokenizer([words], 340).save_pretrained(toy_model_folder)
    with pytest.raises(UserError, match="not from the same training"):
        load_model_and_tokenizer(toy_model_folder)
