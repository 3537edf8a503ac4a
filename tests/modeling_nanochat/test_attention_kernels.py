"""Where cuDNN's attention may be used: in training with rows of one length, and in the compiled decoding step."""

from types import SimpleNamespace

import pytest
from torch.backends.cuda import cudnn_sdp_enabled

from evals import evaluate_model
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.chat import __main__ as chat
from recipes import pretrain
from recipes.training.trl import stage as trl


class Reached(Exception):
    """Raised by what stands in for the first part of a process's work that matters."""


@pytest.fixture
def look(monkeypatch):
    """A function that takes note of the switch and ends the work; the switch is on before and after."""
    assert cudnn_sdp_enabled()
    found = []

    def note(*args, **kwargs):
        found.append(cudnn_sdp_enabled())
        raise Reached

    yield note
    assert found == [False] and cudnn_sdp_enabled()


def test_the_switch_is_as_before_afterwards():
    with without_cudnn_attention(), without_cudnn_attention():
        assert not cudnn_sdp_enabled()
    assert cudnn_sdp_enabled()


def test_sft_and_grpo(look, tmp_path):
    training = SimpleNamespace(output_dir=str(tmp_path / "checkpoints" / "a"), disable_tqdm=True, process_index=1)
    with pytest.raises(Reached):
        trl.run_trl_stage(look, None, training, {}, None, None, None)


def test_evaluation(look, monkeypatch):
    monkeypatch.setattr(evaluate_model.EvaluateArguments, "check", lambda self: None)
    monkeypatch.setattr(evaluate_model, "load_tasks", look)
    with pytest.raises(Reached):
        evaluate_model.run_evaluation(evaluate_model.EvaluateArguments("model", "results.json"))


def test_chat(look, monkeypatch):
    monkeypatch.setattr(chat, "load_model_and_tokenizer", look)
    with pytest.raises(Reached):
        chat.start(["model"])


@pytest.mark.parametrize("number, work", [(1, "core"), (2, "samples")])
def test_core_and_samples_during_pretraining(look, monkeypatch, number, work):
    monkeypatch.setattr(pretrain, work, look)
    with pytest.raises(Reached):
        pretraining_evaluations(monkeypatch)[number].run(None)


def test_validation_during_pretraining_keeps_it(monkeypatch):
    found = []
    evaluations = pretraining_evaluations(monkeypatch, lambda model: found.append(cudnn_sdp_enabled()) or 1.0)
    evaluations[0].run(None)
    assert found == [True]


def pretraining_evaluations(monkeypatch, bits_per_byte=None):
    monkeypatch.setattr(pretrain, "text_rows", lambda *args: None)
    monkeypatch.setattr(pretrain, "validation", lambda *args: bits_per_byte)
    monkeypatch.setattr(pretrain, "load_core", lambda folder: ["a task"])
    args = SimpleNamespace(
        val_files=[],
        eval_tokens=1,
        core_dir="x",
        core_steps=1,
        core_max_per_task=1,
        sample_steps=1,
        sample_prompts=["x"],
    )
    loop = SimpleNamespace(max_length=1, eval_steps=1)
    accelerator = SimpleNamespace(is_fsdp2=False, process_index=0, num_processes=1)
    return pretrain.make_evaluations(args, loop, accelerator, None)
