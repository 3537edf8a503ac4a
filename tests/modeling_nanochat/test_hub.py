"""Models by Hub id: what is downloaded, what is used without network, and what is said if there is nothing."""

import time

import pytest
from huggingface_hub import constants

from modeling_nanochat import hub as own
from modeling_nanochat.chat.examples import training_stage
from modeling_nanochat.errors import UserError
from modeling_nanochat.hub import find_folder
from modeling_nanochat.loading import load_model_and_tokenizer

LOST = "the connection to the Hub failed .*; check the network and run the same command again"
BUSY = "the Hub limits your requests; log in with `hf auth login`, or run the same command again later"


@pytest.fixture
def model(hub, toy_model_folder):
    """`me/toy` on the Hub, with more than a model's files."""
    for name in ("code.py", "model.bin", "checkpoint/model.safetensors"):
        (toy_model_folder / name).parent.mkdir(exist_ok=True)
        (toy_model_folder / name).write_text("of no use")
    (toy_model_folder / "README.md").write_text("---\ntags:\n- nanochat\n- base\n---\n")
    hub.put("me/toy", toy_model_folder)
    return "me/toy"


def complaint(name):
    with pytest.raises(UserError) as error:
        load_model_and_tokenizer(name, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_of_a_repository_only_what_a_model_consists_of_is_downloaded(hub, model, toy_model_and_tokenizer):
    opened, tokenizer = load_model_and_tokenizer(model, device="cpu")
    assert len(tokenizer) == len(toy_model_and_tokenizer[1]) and training_stage(opened.name_or_path) == "base"
    assert {path.name for path in find_folder(model).rglob("*")} == hub.repositories["models", model].files.keys() - {
        "code.py",
        "model.bin",
        "checkpoint/model.safetensors",
    }


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda hub: hub.cut("model.safetensors", keep=1000, times=9), f"cannot be downloaded: {LOST}"),
        (lambda hub: hub.cut("GET /me/toy/resolve", 9, times=99, breaks=False), f"cannot be downloaded: {LOST}"),
        (lambda hub: hub.fail("model.safetensors", 500, times=99), "internal error .status 500.; run the same comm"),
        (lambda hub: hub.fail("model.safetensors", 429, times=99, Retry_After="3"), BUSY),
        (lambda hub: hub.fail("/api/models", 429), BUSY),
        (lambda hub: hub.fail("", 401, times=99), "the Hub does not accept your token; log in with `hf auth login`"),
        (lambda hub: hub.fail("/api", 403, X_Error_Message="No such scope"), "the Hub forbids it .*No such scope"),
        (
            lambda hub: hub.fail("tokenizer.json", 400, X_Error_Message="No such thing"),
            "the Hub refused .*No such thing",
        ),
    ],
)
def test_a_failed_download_is_one_line_and_its_complete_files_are_kept(hub, model, break_it, said):
    break_it(hub)
    with pytest.raises(UserError, match=rf"^me/toy: .*{said}") as caught:
        load_model_and_tokenizer(model, device="cpu")
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    kept = {file.name for file in (hub.cache / "models--me--toy").glob("snapshots/*/*")}
    hub.requests.clear()
    load_model_and_tokenizer(model, device="cpu")
    needed = {path.name for path in find_folder(model).iterdir()}
    assert {name for name in needed if hub.sent(name)} == needed - kept


def test_a_cache_that_cannot_be_written_is_named(hub, model):
    hub.cache.parent.mkdir()
    hub.cache.write_text("a file")
    assert str(hub.cache) in complaint(model)


def test_a_connection_that_breaks_once_is_not_noticed(hub, model):
    hub.cut("GET /me/toy/resolve", keep=1000)
    hub.fail("GET .*tokenizer_config.json", 429, Retry_After="3")
    load_model_and_tokenizer(model, device="cpu")
    assert 4 in hub.waits


def test_without_an_answer_from_the_hub_one_whole_line_comes_within_seconds(hub, monkeypatch):
    hub.silence()
    monkeypatch.setattr(own, "SECONDS_TO_ANSWER", 0.2)
    started = time.monotonic()
    assert complaint("me/typo").endswith("timed out); check the network and run the same command again")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("trouble", ["silence", "offline", "500"])
def test_what_was_downloaded_before_opens_without_the_hub(hub, model, monkeypatch, trouble):
    folder = find_folder(model)
    if trouble == "silence":
        hub.silence()
        monkeypatch.setattr(own, "SECONDS_TO_ANSWER", 0.2)
    elif trouble == "500":
        hub.fail("", 500, times=99)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", trouble == "offline")
    opened, _ = load_model_and_tokenizer(model, device="cpu")
    assert folder.samefile(opened.name_or_path)


def test_a_download_that_broke_off_says_what_is_missing(hub, model, monkeypatch):
    (find_folder(model) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^me/toy: has no model.safetensors; .* or the download\?"):
        load_model_and_tokenizer(model)


def test_offline_the_setting_is_named():
    assert "no such folder, and HF_HUB_OFFLINE forbids downloading it; unset the variable" in complaint("me/typo")


def test_what_is_no_hub_id_is_not_asked_for(hub):
    assert "not a Hub id" in complaint("my name/a model?")
    assert not hub.requests


@pytest.mark.parametrize("token", ["hf_test", None])
def test_unknown_and_gated_models_are_one_line(hub, model, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert "no such folder, and no such model on the Hub that you can read" in complaint("me/typo")
    hub.put("me/closed", {"config.json": "{}"}, gated=True)
    assert "the Hub gives this model on request only; ask for it on its page, and log in" in complaint("me/closed")
