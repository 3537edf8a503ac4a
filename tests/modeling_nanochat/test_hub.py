import socket
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from modeling_nanochat import hub
from modeling_nanochat.chat.examples import training_stage
from modeling_nanochat.errors import UserError
from modeling_nanochat.hub import find_folder
from modeling_nanochat.loading import load_model_and_tokenizer


@pytest.fixture
def cached_model(toy_model_folder, tmp_path, monkeypatch):
    """`me/toy` in a cache of its own as the Hub's client leaves it: links to blobs that lie outside the snapshot."""
    repository = tmp_path / "cache" / "models--me--toy"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for path in toy_model_folder.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return snapshot


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A Hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub.model_info.__self__, "endpoint", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 0.2)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield


def complaint(name):
    with pytest.raises(UserError) as error:
        find_folder(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_an_answer_from_the_hub_one_whole_line_comes_within_seconds(silent_hub):
    started = time.monotonic()
    assert complaint("me/typo").endswith("(ReadTimeout); check the network, or give a folder")
    assert time.monotonic() - started < 5


def test_what_was_downloaded_before_opens_without_an_answer_from_the_hub(silent_hub, cached_model):
    assert find_folder("me/toy").samefile(cached_model)


def test_what_was_downloaded_before_opens_offline(cached_model, toy_model_and_tokenizer):
    (cached_model / "README.md").write_text("---\ntags:\n- nanochat\n- base\n---\n")
    model, tokenizer = load_model_and_tokenizer("me/toy", device="cpu")
    assert len(tokenizer) == len(toy_model_and_tokenizer[1])
    assert training_stage(model.name_or_path) == "base"


def test_a_download_that_broke_off_says_what_is_missing(cached_model):
    (cached_model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^me/toy: has no model.safetensors; .* or the download\?"):
        load_model_and_tokenizer("me/toy")


def test_offline_the_setting_is_named():
    assert "HF_HUB_OFFLINE forbids" in complaint("me/typo")


def test_what_is_no_hub_id_is_not_asked_for():
    assert "not a Hub id" in complaint("my name/a model?")


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_unknown_and_closed_models_are_one_line(kind, monkeypatch):
    def refuse(name, timeout):
        raise kind.__new__(kind)

    monkeypatch.setattr(hub, "model_info", refuse)
    assert "no such model on the Hub that you can read" in complaint("me/typo")


def test_why_a_download_failed_is_told_whole(monkeypatch):
    url = "https://huggingface.co/" + "x" * 400

    def fail(*_, **__):
        raise OSError(f"No space left\nwhile reading {url}")

    monkeypatch.setattr(hub, "model_info", lambda name, timeout: None)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert complaint("me/big").endswith(f"failed: No space left while reading {url}")


def test_of_a_repository_only_what_a_model_consists_of_is_downloaded(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(hub, "model_info", lambda name, timeout: None)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path))
    assert find_folder("me/toy") == tmp_path
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    assert asked["ignore_patterns"] == ["*/*"]
