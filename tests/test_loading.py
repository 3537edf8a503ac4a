import json
import shutil

import pytest
import torch

from modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer, pick_device
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


def test_weights_that_do_not_match_the_config_are_refused(toy_model_folder):
    config = json.loads((toy_model_folder / "config.json").read_text())
    for change, message in [({"num_hidden_layers": 3}, "lacks"), ({"vocab_size": 100}, "cannot be opened|only 100")]:
        (toy_model_folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_model_and_tokenizer(toy_model_folder)


def test_a_tokenizer_of_another_training_is_refused(toy_model_folder):
    words = " ".join(f"{a}{b}{a} " for a in "abcdefghij" for b in "klmnopqrst")
    train_tokenizer([words], 340).save_pretrained(toy_model_folder)
    with pytest.raises(UserError, match="not from the same training"):
        load_model_and_tokenizer(toy_model_folder)
