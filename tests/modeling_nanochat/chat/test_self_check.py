"""The checks that chat, server and rollouts make before they rely on a model."""

import copy
import json
import runpy
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import random_model
from golden import plain_model, turbo_model

from modeling_nanochat import ARCHITECTURES, NanoChatModel, NanoChatTurboModel
from modeling_nanochat.chat import __main__ as chat
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.self_check import (
    FLOAT32_LIMIT,
    REDUCED_LIMIT,
    by_generate,
    check_cached_decoding,
    check_renderings,
    disagreement,
    probe,
    without_cache,
)
from modeling_nanochat.checks import versions
from modeling_nanochat.errors import UserError
from recipes import grpo
from recipes.training.stage import OutputArguments, check_output


def trained_like(architecture: str, seed: int, dtype: torch.dtype = torch.float32, depth: int = 4):
    """Weights of the size that training gives them: none is zero, and logits have a standard deviation of about 1."""
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class.from_depth(depth, aspect_ratio=32, head_dim=32, vocab_size=1536))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


@pytest.fixture
def ignored_cache(monkeypatch):
    """What transformers 5.24 did to models that knew the cache by its earlier name only: it is passed and not seen."""
    for model_class in (NanoChatModel, NanoChatTurboModel):
        forward = model_class.forward

        def deaf(self, *args, forward=forward, past_key_values=None, cache=None, **kwargs):
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(model_class, "forward", deaf)


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_that_uses_its_cache_passes(architecture, dtype, seed):
    check_cached_decoding(trained_like(architecture, seed, dtype))


@pytest.mark.parametrize("make", [plain_model, turbo_model])
def test_the_originals_weights_pass(make):
    check_cached_decoding(make())


@pytest.mark.parametrize(
    "make", [lambda: random_model("plain"), lambda: ARCHITECTURES["turbo"][1](ARCHITECTURES["turbo"][0].from_depth(2))]
)
def test_wild_and_untrained_weights_pass(make):
    check_cached_decoding(make().eval())


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_an_ignored_cache_exceeds_both_limits_tenfold(architecture, ignored_cache):
    model = trained_like(architecture, 0)
    rows = probe(model)
    with torch.no_grad():
        expected, logits = without_cache(model, rows), by_generate(model, rows)
    difference = logits - expected
    assert difference.abs().max() > 10 * FLOAT32_LIMIT
    assert (difference.pow(2).mean(-1).sqrt() / expected.std(-1)).max() > 10 * REDUCED_LIMIT
    assert disagreement(logits, expected, reduced=False) and disagreement(logits, expected, reduced=True)


def test_a_cache_that_only_the_engine_s_decoder_does_without_is_one_line(ignored_cache, monkeypatch):
    model = trained_like("plain", 0)
    monkeypatch.setattr("modeling_nanochat.chat.self_check.by_generate", without_cache)
    with pytest.raises(UserError, match="the chat engine computes other logits"):
        check_cached_decoding(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_cache_is_one_line_with_the_versions(dtype, ignored_cache):
    with pytest.raises(
        UserError, match=rf"generate computes other logits .* transformers {metadata.version('transformers')}"
    ) as raised:
        check_cached_decoding(trained_like("plain", 0, dtype))
    assert "\n" not in str(raised.value)


def test_rounding_of_a_deep_model_in_bfloat16_stays_within_the_limit():
    """As different as two paths on a GPU can be: one rounds everything, the other nothing."""
    for architecture in ("plain", "turbo"):
        model = trained_like(architecture, 0, depth=12)
        rows = probe(model)
        with torch.no_grad():
            exact = without_cache(model, rows)
            assert disagreement(without_cache(model.bfloat16(), rows), exact, reduced=True) is None


def test_logits_that_are_not_finite_do_not_pass():
    model = trained_like("plain", 0)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match="nan apart"):
        check_cached_decoding(model)


def test_the_model_is_left_as_it_was():
    model = trained_like("plain", 0).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    generation = model.generation_config.to_dict()
    check_cached_decoding(model)
    assert model.training and model.generation_config.to_dict() == generation
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_check_is_quick_for_the_pocket_model():
    """Less than 100 ms; three times as much is left for a slower processor."""
    model = trained_like("turbo", 0)
    check_cached_decoding(model)
    seconds = []
    for _ in range(5):
        started = time.process_time()  # so that a busy machine changes nothing
        check_cached_decoding(model)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.3


def test_training_marks_what_is_generated(toy_model_and_tokenizer):
    check_renderings(toy_model_and_tokenizer[1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{%- generation -%}", "{{- ' ' -}}{%- generation -%}"),  # training reads a blank that no prompt ends with
        # a second start behind a result
        ("and not ns.open -%}{{- '<|assistant_start|>'", "-%}{{- '<|assistant_start|>'"),
        ("{%- generation -%}", "{%- generation -%}{%- endgeneration -%}"),  # nothing is marked
    ],
)
def test_renderings_that_do_not_agree_are_one_line(toy_model_and_tokenizer, before, after):
    tokenizer = copy.deepcopy(toy_model_and_tokenizer[1])
    assert before in tokenizer.chat_template
    changed = tokenizer.chat_template.replace(before, after)
    if after.endswith("{%- endgeneration -%}"):  # the block is empty; its own end goes
        changed = "".join(changed.rsplit("{%- endgeneration -%}", 1))
    tokenizer.chat_template = changed
    with pytest.raises(UserError, match="marks other tokens for training"):
        check_renderings(tokenizer)


def test_versions_outside_of_the_tested_ones_are_named_with_both(monkeypatch):
    assert versions.untested_versions() == []
    real = versions.version
    for installed in ("5.16.0", "6.0.0"):
        monkeypatch.setattr(versions, "version", lambda name, v=installed: v if name == "transformers" else real(name))
        (line,) = [line for line in versions.untested_versions() if line.startswith("transformers ")]
        assert installed in line and ">=5.17" in line


def test_chat_and_training_warn_of_such_versions_once_and_go_on(
    toy_model_and_tokenizer, tmp_path, monkeypatch, capsys
):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: "9.9.9" if name == "transformers" else real(name))
    for start in (
        lambda: Engine(*toy_model_and_tokenizer),
        lambda: check_output(OutputArguments(str(tmp_path / "base"))),
    ):
        start()
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" is ")[0] for line in lines] == ["warning: transformers 9.9.9"]


def test_the_chat_refuses_a_model_whose_cache_is_ignored(toy_model_folder, ignored_cache):
    with pytest.raises(UserError, match="computes other logits with the model's cache"):
        chat.start([str(toy_model_folder), "--prompt", "Hi"])


def test_the_page_refuses_a_model_whose_cache_is_ignored(toy_model_folder, ignored_cache):
    pytest.importorskip("gradio")
    page = runpy.run_path(str(Path(__file__).parents[3] / "space" / "app.py"))
    with pytest.raises(UserError, match="computes other logits with the model's cache"):
        page["start"]([str(toy_model_folder)])


def test_grpo_refuses_a_model_whose_cache_is_ignored_and_leaves_nothing(
    toy_model_folder, ignored_cache, tmp_path, monkeypatch
):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"{i}+7?", "answer": f"#### {i + 7}"}) + "\n" for i in range(8))
    )
    settings = {"model_name_or_path": toy_model_folder, "train_files": problems, "output_dir": tmp_path / "run" / "rl"}
    settings |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 1}
    settings |= {"gradient_accumulation_steps": 1}
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    monkeypatch.setattr("sys.argv", ["grpo.py", *words])
    with pytest.raises(UserError, match="computes other logits with the model's cache"):
        grpo.main()
    assert not (tmp_path / "run" / "rl").exists() and not (tmp_path / "run" / "stages").exists()
