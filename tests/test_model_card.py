import copy
import re
import warnings

import pytest
import torch
import transformers
from conftest import random_model
from packaging.version import Version
from transformers import TextGenerationPipeline
from transformers.utils import logging

from modeling_nanochat import NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.engine import ChatCodec
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.stages import STAGES, training_stage
from recipes.model_card import model_card
from recipes.stage import OutputArguments, StageLog, finish_stage


def toy_of(architecture, toy_model_and_tokenizer):
    model, tokenizer = copy.deepcopy(toy_model_and_tokenizer)
    if architecture == "turbo":
        sizes = random_model("turbo").config.to_diff_dict() | {"vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        model = NanoChatTurboForCausalLM(NanoChatTurboConfig(**sizes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval(), tokenizer


@pytest.fixture(params=["plain", "turbo"])
def finished(request, toy_model_and_tokenizer, tmp_path):
    """Finished folders of all stages, by stage."""
    for stage in STAGES:
        args = OutputArguments(str(tmp_path / stage))
        record = {"stage": stage, "settings": {"output_dir": args.output_dir}}
        parts = toy_of(request.param, toy_model_and_tokenizer)
        finish_stage(*parts, args, StageLog(args.output_dir), record, model_card)
    return {stage: tmp_path / stage for stage in STAGES}


def snippet(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def run_snippet(folder, capsys, caplog):
    """What the card's code prints, with the most likely token each time in place of the pipeline's sampling.

    No warning may come with it, neither Python's nor in transformers' log; those that come once in a process count as new.
    """
    default = TextGenerationPipeline._default_generation_config
    logging.warning_once.cache_clear()
    logging.add_handler(caplog.handler)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(default, "do_sample", False)
        patch.setattr(default, "temperature", 1.0)
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", UserWarning)
        exec(snippet(folder), {})
    logging.remove_handler(caplog.handler)
    if Version(transformers.__version__) >= Version("5.23"):  # the pipeline of older ones warns of its own defaults
        assert [record.getMessage() for record in caplog.records] == []
    return capsys.readouterr().out


@torch.no_grad()
def greedy(model, ids, steps):
    """The most likely tokens after `ids`, each by a pass over everything before it, up to an end of turn."""
    new = []
    while len(new) < steps and (not new or new[-1] not in model.generation_config.eos_token_id):
        new.append(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
    return new


def test_the_code_in_every_card_continues_as_the_model_does_without_a_warning(finished, capsys, caplog):
    for stage, folder in finished.items():
        model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
        if stage == "base":
            ids = [tokenizer.bos_token_id, *tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]
            expected = "Once upon a time" + tokenizer.decode(greedy(model, ids, 64), skip_special_tokens=False)
        else:
            ids = ChatCodec(tokenizer).prompt([{"role": "user", "content": "Who are you?"}])
            said, prefix = (tokenizer.decode(part) for part in (greedy(model, ids, 64), ids))
            expected = tokenizer.parse_response(said, prefix=prefix)
        assert run_snippet(folder, capsys, caplog) == f"{expected}\n", stage


def test_the_stage_is_read_from_the_card_that_it_wrote(finished):
    for stage, folder in finished.items():
        assert training_stage(load_model_and_tokenizer(folder, device="cpu")[0]) == stage
