"""A checkpoint of the original under the name of a model: converted once, kept, replaced by its successor."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_TEXTS
from huggingface_hub import constants
from original import VOCAB, pickle_tokenizer, toy_checkpoint, toy_config, toy_weights, write_checkpoint
from transformers import PreTrainedModel

from modeling_nanochat.convert import cached
from modeling_nanochat.convert.__main__ import main as convert
from modeling_nanochat.convert.cached import float32_bytes, model_folder
from modeling_nanochat.convert.config import OriginalConfig
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from tokenizer_train.bpe import train_tokenizer

NAME = "me/original"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TOY_TEXTS, VOCAB, model_max_length=256)


@pytest.fixture
def checkpoint(hub, tmp_path, tokenizer):
    """A checkpoint in launch layout, as a folder and on the Hub."""
    folder = toy_checkpoint(tmp_path / "checkpoints" / "d2", tokenizer)
    hub.put(NAME, folder)
    return folder


def kept(tmp_path: Path) -> list[Path]:
    """Everything in the cache of conversions but the locks."""
    found = (tmp_path / "huggingface" / "assets" / "nanochat").glob("*/*")
    return [path for path in found if path.name != ".lock"]


def converted_head(name: str) -> torch.Tensor:
    return load_model_and_tokenizer(name, device="cpu")[0].lm_head.weight


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_what_opens_by_hub_id_equals_what_the_command_converts(architecture, hub, tokenizer, tmp_path, capsys):
    folder = toy_checkpoint(tmp_path / "d2", tokenizer, architecture)
    write_checkpoint(folder, toy_weights(), toy_config(), step=2)
    hub.put(NAME, folder)
    model, opened = load_model_and_tokenizer(NAME, device="cpu")
    assert re.search(
        rf"note: {NAME} is a checkpoint of the original nanochat; downloading and", capsys.readouterr().err
    )
    convert(["--input", str(folder), "--output_dir", str(tmp_path / "by_hand")])
    expected, _ = load_model_and_tokenizer(tmp_path / "by_hand", device="cpu")
    assert opened.get_vocab() == tokenizer.get_vocab() and type(model) is type(expected)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in model.state_dict().items())
    assert hub.sent("model_000003.pt")
    assert not hub.sent("model_000002.pt") and not hub.sent("token_bytes.pt")


def test_a_second_start_needs_neither_the_network_nor_the_download(checkpoint, hub, monkeypatch, capsys):
    first = model_folder(NAME)
    for weights in hub.cache.rglob("model_*.pt"):
        weights.unlink()
    hub.requests.clear()
    assert model_folder(NAME) == first and not hub.sent("model_000003.pt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert model_folder(NAME) == first and capsys.readouterr().err == ""


def test_what_was_downloaded_earlier_is_converted_without_network(checkpoint, hub, monkeypatch):
    model_folder(NAME)
    for step in model_folder(NAME).iterdir():
        step.unlink()
    model_folder(NAME).rmdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(converted_head(NAME), toy_weights()["lm_head.weight"])


def test_a_new_revision_replaces_the_conversion_of_the_old_one(checkpoint, hub, tmp_path):
    first = model_folder(NAME)
    weights = toy_weights()
    weights["lm_head.weight"] += 1
    write_checkpoint(checkpoint, weights, toy_config(), step=4)
    hub.put(NAME, checkpoint)
    assert torch.equal(converted_head(NAME), weights["lm_head.weight"])
    assert len(kept(tmp_path)) == 1 and not first.exists()


def test_a_local_checkpoint_is_converted_again_only_when_a_file_of_it_changes(checkpoint, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    first = model_folder(str(checkpoint))
    monkeypatch.chdir(checkpoint.parent)
    assert model_folder("d2") == first
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    weights = toy_weights()
    weights["lm_head.weight"] += 1
    write_checkpoint(checkpoint, weights, toy_config())
    assert torch.equal(converted_head("d2"), weights["lm_head.weight"])
    assert kept(tmp_path) == [model_folder("d2")] != [first]
    twin = toy_checkpoint(tmp_path / "elsewhere" / "d2", train_tokenizer(TOY_TEXTS, VOCAB))
    assert model_folder(str(twin)) != model_folder("d2") and len(kept(tmp_path)) == 2


def test_the_originals_tokenizer_for_all_checkpoints_is_part_of_the_conversion(tokenizer, tmp_path, hub):
    folder = write_checkpoint(tmp_path / "sft_checkpoints" / "d2", toy_weights(), toy_config())
    (tmp_path / "tokenizer").mkdir()
    pickle_tokenizer(tokenizer, tmp_path / "tokenizer")
    first = model_folder(str(folder))
    os.utime(tmp_path / "tokenizer" / "tokenizer.pkl", (1, 1))
    assert model_folder(str(folder)) != first


def test_a_tokenizer_in_a_folder_of_the_repository_is_found(checkpoint, hub, tokenizer):
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer.pkl").rename(checkpoint / "tokenizer" / "tokenizer.pkl")
    (checkpoint / "tokenizer" / "train.py").write_text("of no use")
    hub.put(NAME, checkpoint)
    assert load_model_and_tokenizer(NAME, device="cpu")[1].get_vocab() == tokenizer.get_vocab()
    assert not hub.sent("tokenizer/train.py")
    assert torch.equal(converted_head(str(checkpoint)), toy_weights()["lm_head.weight"])


def test_too_little_space_is_told_before_anything_is_downloaded(checkpoint, hub, tmp_path, monkeypatch):
    size = float32_bytes(OriginalConfig.from_dict(toy_config()))
    monkeypatch.setattr(cached.shutil, "disk_usage", lambda place: SimpleNamespace(free=2 * size - 1))
    with pytest.raises(UserError, match=rf"^{NAME}: its conversion takes .* GB are free; free some, or set HF_HOME"):
        model_folder(NAME)
    assert not hub.sent("model_000003.pt") and kept(tmp_path) == []
    model_folder(str(checkpoint))  # which needs no download


@pytest.mark.parametrize("is_turbo", [False, True])
def test_the_space_is_that_of_the_tensors(is_turbo):
    sizes = OriginalConfig.from_dict(toy_config(window_pattern="SL") if is_turbo else toy_config())
    weights = toy_weights(turbo=is_turbo).values()
    exact = 4 * sum(tensor.numel() for tensor in weights if is_turbo is False or tensor.numel() > 24)
    assert float32_bytes(sizes) == exact


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UserError)],
)
def test_a_conversion_that_breaks_off_leaves_nothing(failure, raised, checkpoint, tmp_path, monkeypatch):
    def fail(self, folder, **settings):
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch, pytest.raises(raised) as caught:
        patch.setattr(PreTrainedModel, "save_pretrained", fail)
        model_folder(NAME)
    assert raised is KeyboardInterrupt or "No space left on device; free disk space" in str(caught.value)
    assert kept(tmp_path) == []
    assert torch.equal(converted_head(NAME), toy_weights()["lm_head.weight"])


def test_what_a_killed_conversion_left_is_removed(checkpoint, tmp_path):
    folder = model_folder(NAME)
    unfinished = folder.rename(folder.with_name(f".{folder.name}.unfinished"))
    other = folder.with_name(".step-000001-0.unfinished")
    other.mkdir()
    assert model_folder(NAME) == folder and kept(tmp_path) == [folder]
    assert not unfinished.exists() and not other.exists()


def test_processes_that_start_together_convert_once(checkpoint, monkeypatch):
    calls = []

    def slowly(*arguments, **settings):
        calls.append(arguments)
        time.sleep(0.3)
        return write(*arguments, **settings)

    write = cached.write_model_folder
    monkeypatch.setattr(cached, "write_model_folder", slowly)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(model_folder, [NAME] * 3))
    assert len(calls) == len(set(folders)) == 1


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(checkpoint, hub, tmp_path):
    weights = toy_weights()
    del weights["lm_head.weight"]
    write_checkpoint(checkpoint, weights, toy_config())
    hub.put(NAME, checkpoint)
    with pytest.raises(UserError, match=r"model_000003\.pt: neither the launch nor the current layout") as caught:
        model_folder(NAME)
    assert "\n" not in str(caught.value) and kept(tmp_path) == []
    (checkpoint / "tokenizer.pkl").unlink()
    write_checkpoint(checkpoint, toy_weights(), toy_config())
    with pytest.raises(UserError, match=r"no tokenizer\.json or tokenizer\.pkl"):
        model_folder(str(checkpoint))


def chat(hub, home: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "modeling_nanochat.chat", NAME, "-p", "hi", *arguments]
    environment = os.environ | hub.environment(home) | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_the_command_talks_with_it_and_then_without_network(architecture, hub, tokenizer, tmp_path):
    hub.put(NAME, toy_checkpoint(tmp_path / "d2", tokenizer, architecture))
    greedy = ["--temperature", "0", "--max_new_tokens", "5"]
    first = chat(hub, tmp_path / "home", *greedy)
    said, told = first.communicate()
    assert first.returncode == 0 and said.strip(), told
    assert told.startswith(f"note: {NAME} is a checkpoint of the original") and told.count("\n") == 1
    again = chat(hub, tmp_path / "home", *greedy, HF_HUB_OFFLINE="1")
    assert again.communicate() == (said, "") and again.returncode == 0


@pytest.mark.slow
def test_ctrl_c_during_the_download_ends_it_at_once(checkpoint, hub, tmp_path):
    hub.silence("GET .*model_000003.pt")
    process = chat(hub, tmp_path / "home")
    while not hub.sent("model_000003.pt"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert list((tmp_path / "home" / "assets").glob("nanochat/*/step*")) == []
