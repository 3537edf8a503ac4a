import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanochat.errors import UserError
from modeling_nanochat.folders import atomic_directory
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.training.model_card import model_card
from recipes.training.stage import JsonlLogger, OutputArguments, check_output, finish_stage, push


@pytest.fixture
def finished(toy_model_and_tokenizer, tmp_path):
    """A stage's folder, log and record."""
    model, tokenizer = toy_model_and_tokenizer
    args = OutputArguments(str(tmp_path / "run" / "base"))
    log = JsonlLogger(args.output_dir)
    log.log(step=1, loss=2.5)
    record = {"stage": "base", "settings": {"output_dir": args.output_dir, "depth": 2}, "steps": 1, "tokens": 64}
    finish_stage(model, tokenizer, args, log, record, model_card)
    return tmp_path / "run"


def test_a_stage_leaves_a_whole_folder_a_log_and_a_record(finished, toy_model_and_tokenizer):
    names = {path.name for path in (finished / "base").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model, _tokenizer = toy_model_and_tokenizer
    opened = AutoModelForCausalLM.from_pretrained(finished / "base")
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    ends = AutoTokenizer.from_pretrained(finished / "base").convert_tokens_to_ids(
        ["<|assistant_end|>", "<|python_end|>", "<|bos|>", "<|output_start|>"]
    )
    assert opened.generation_config.eos_token_id == ends
    line = json.loads((finished / "logs" / "base.jsonl").read_text())
    assert (line["step"], line["loss"]) == (1, 2.5) and line["seconds"] >= 0
    record = json.loads((finished / "stages" / "base.json").read_text())
    assert record["parameters"] == model.num_parameters() and record["machine"]["cores"] >= 1
    card = (finished / "base" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and f"{model.num_parameters():,} parameters" in card


def test_an_interrupted_folder_never_takes_the_final_name(tmp_path):
    target = tmp_path / "base"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert not target.exists()
    with atomic_directory(target) as folder:
        assert not list(folder.iterdir())
        (folder / "model.safetensors").write_text("whole")
    assert (target / "model.safetensors").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target):
        raise KeyboardInterrupt
    assert (target / "model.safetensors").read_text() == "whole"
    with atomic_directory(target) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_finished_model_is_not_overwritten_unasked(tmp_path):
    with pytest.raises(UserError, match="overwrite_output_dir"):
        check_output(OutputArguments(str(tmp_path)))
    check_output(OutputArguments(str(tmp_path), overwrite_output_dir=True))
    with pytest.raises(UserError, match="hub_model_id"):
        check_output(OutputArguments(str(tmp_path / "new"), push_to_hub=True))


def test_a_stage_pushes_its_whole_folder(finished, hub, toy_model_and_tokenizer):
    args = OutputArguments(str(finished / "sft"), push_to_hub=True, hub_model_id="me/toy", hub_private_repo=True)
    record = {"stage": "sft", "base_model": "me/base", "settings": vars(args)}
    finish_stage(*toy_model_and_tokenizer, args, JsonlLogger(args.output_dir), record, model_card)
    push(args)
    pushed = hub.repositories["models", "me/toy"]  # hub 1.x says `private`, 2.x `visibility`
    assert pushed.settings.get("private") or pushed.settings.get("visibility") == "private"
    assert pushed.files == {path.name: path.read_bytes() for path in (finished / "sft").iterdir()}
    card = pushed.files["README.md"].decode()
    assert "base_model: me/base" in card and "# me/toy" in card
    model, _ = load_model_and_tokenizer("me/toy", device="cpu")
    assert torch.equal(model.lm_head.weight, toy_model_and_tokenizer[0].lm_head.weight)


def test_a_local_predecessor_is_no_base_model_for_the_hub(finished):
    record = json.loads((finished / "stages" / "base.json").read_text())
    for local in (str(finished / "base"), "runs/pocket/mid", "./mid"):
        assert "base_model" not in model_card(record | {"stage": "mid", "base_model": local}).split("---")[1]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda hub: hub.fail("/api", 401, times=9),
            "the Hub does not accept your token; log in with `hf auth login`",
        ),
        (
            lambda hub: hub.fail("/commit/", 403, X_Error_Message="read only"),
            "the Hub forbids it .*read only.*; log in",
        ),
        (
            lambda hub: hub.fail("/api/repos", 429),
            "the Hub limits your requests; .* or run the same command again later",
        ),
        (
            lambda hub: hub.fail("PUT /uploads", 500, times=99),
            "the Hub had an internal error .status 500.; run the same",
        ),
        (
            lambda hub: hub.cut("POST", keep=0, times=99),
            "the connection to the Hub failed .*; check the network and run",
        ),
    ],
)
def test_a_failed_push_says_what_to_do_and_the_next_one_succeeds(finished, hub, break_it, said):
    args = OutputArguments(str(finished / "base"), push_to_hub=True, hub_model_id="me/toy")
    break_it(hub)
    with pytest.raises(
        UserError, match=f"^push to me/toy failed: {said}.*; the model is complete in .*hf upload me/"
    ) as caught:
        push(args)
    assert "\n" not in str(caught.value) and (finished / "base" / "model.safetensors").exists()
    hub.faults.clear()
    push(args)
    assert hub.repositories["models", "me/toy"].files.keys() == {path.name for path in (finished / "base").iterdir()}


def test_a_push_to_someone_else_names_the_repository(finished, hub):
    with pytest.raises(UserError, match="push to you/toy failed: the Hub forbids it .*you may write to `me` only"):
        push(OutputArguments(str(finished / "base"), push_to_hub=True, hub_model_id="you/toy"))
