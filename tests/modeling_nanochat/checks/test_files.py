import json
import os
import socket

import pytest

from modeling_nanochat.checks.files import MAX_BYTES
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import check_folder, load_model_and_tokenizer


def refusal(folder):
    with pytest.raises(UserError) as error:
        check_folder(folder, "me/toy")
    assert "\n" not in str(error.value) and str(error.value).startswith("me/toy: ")
    return str(error.value)


def bind(path):
    os.chdir(path.parent)  # a socket's path has at most 100 characters
    socket.socket(socket.AF_UNIX).bind(path.name)


NOT_FILES = {
    "pipe": os.mkfifo,
    "socket": bind,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "endless link": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "kernel's file": lambda path: path.symlink_to("/proc/self/environ"),
    "empty": lambda path: path.touch(),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("file", MAX_BYTES)
def test_what_is_no_file_is_not_opened(tmp_path, file, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    NOT_FILES[kind](tmp_path / file)
    assert f"{file} is empty or not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize("file", MAX_BYTES)
def test_a_file_of_a_hundred_gigabytes_is_not_read(tmp_path, file):
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(100 * 2**30)
    assert f"{file} has 107,374,182,400 bytes" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_other_files_are_ignored(toy_model_folder):
    for file in ("vocab.json", "merges.txt", "processor_config.json", "trainer_state.json"):
        with (toy_model_folder / file).open("wb") as sparse:
            sparse.truncate(100 * 2**30)
    os.mkfifo(toy_model_folder / "README.md")
    load_model_and_tokenizer(toy_model_folder, device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": NaN}', "[" * 100_000, '{"a": 1, "a": 2}'])
def test_broken_generation_settings_are_one_line(toy_model_folder, content):
    (toy_model_folder / "generation_config.json").write_text(content)
    assert "generation_config.json cannot be opened" in refusal(toy_model_folder)


def test_an_index_of_too_many_tensors_is_not_opened(toy_model_folder):
    (toy_model_folder / "model.safetensors").rename(toy_model_folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(map(str, range(100_001)), "model-1.safetensors")}
    (toy_model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 100,001 tensors" in refusal(toy_model_folder)


def test_more_templates_are_refused(toy_model_folder):
    (toy_model_folder / "additional_chat_templates").mkdir()
    assert "additional_chat_templates" in refusal(toy_model_folder)
