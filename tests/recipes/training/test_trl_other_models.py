"""SFT and GRPO of other people's models, and LoRA adapters of any."""

import json
import logging
import sys

import pytest
import torch
from conftest import random_model, toy_tokenizer
from other_models import CHATML, SMOL, chatml_llama, gpt2, qwen3
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from test_trl import SCRIPTS, log_of, record_of, stop_before_step
from training import forkserver, midtrain_arguments, run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import recipes.midtrain
import recipes.training.trl.rewards
import recipes.training.trl.rollouts
from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer

LORA = {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
FEW = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Calls a stage's `main` on the model in `folder`; returns its output folder."""
    chats = [
        [{"role": "user", "content": f"{i}+7?"}, {"role": "assistant", "content": f"{i + 7}."}] for i in range(16)
    ]
    problems = [{"question": f"What is {i}+7?", "answer": f"#### {i + 7}"} for i in range(16)]
    for name, records in (("sft", [{"messages": chat} for chat in chats]), ("rl", problems)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def main(stage, folder, run="run", **settings):
        given = {
            "model_name_or_path": folder, "train_files": tmp_path / f"{stage}.jsonl", "save_strategy": "no",
            "output_dir": tmp_path / run / stage, "disable_tqdm": "true", "per_device_train_batch_size": 4,
            "max_steps": 2, "logging_steps": 1,
        }  # fmt: skip
        given |= (FEW | {"gradient_accumulation_steps": 1} if stage == "rl" else {}) | settings
        words = [word for key, value in given.items() for word in (f"--{key}", *str(value).split())]
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *words])
        SCRIPTS[stage].main()
        return given["output_dir"]

    return main


def alternating(completions, **kwargs):
    return [float(number % 2) for number in range(len(completions))]


@pytest.mark.parametrize(("make", "template"), [(chatml_llama, CHATML), (qwen3, None), (gpt2, CHATML)])
def test_sft_of_another_model_learns_and_leaves_a_folder_that_chats_anywhere(make, template, start, tmp_path):
    folder = make(tmp_path / "model", template) if template else make(tmp_path / "model")
    output = start("sft", folder, max_steps=12, learning_rate=0.01, num_train_epochs=3)
    losses = [row["loss"] for row in log_of(output)]
    assert losses[-1] < 0.8 * losses[0]
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(output)
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map and after.get_vocab() == before.get_vocab()
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, output)]
    assert all(configs[0][key] == configs[1][key] for key in ("eos_token_id", "bos_token_id", "pad_token_id"))
    chat = pipeline("text-generation", str(output), tokenizer=after)
    question = [{"role": "user", "content": "3+7?"}]
    assert chat(question, max_new_tokens=8)[0]["generated_text"][-1]["role"] == "assistant"
    load_model_and_tokenizer(output)
    settings = record_of(output)["settings"]
    assert settings["learning_rate"] == 0.01 and not settings.keys() & {"matrix_lr", "init_lr_fraction", "lora_r"}


def test_the_card_of_another_model_says_what_it_is(start, tmp_path):
    card = (start("sft", chatml_llama(tmp_path / "model")) / "README.md").read_text()
    assert "A `llama` model" in card and "trained further" in card and "transformers serve" in card
    assert "from scratch" not in card and "nanochat-chat" not in card and "- nanochat" not in card


def test_a_base_model_learns_to_stop_at_its_template_s_end_of_turn(start, tmp_path):
    folder = chatml_llama(tmp_path / "model", SMOL, eos_token="<|endoftext|>")
    output = start("sft", folder)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ends = AutoModelForCausalLM.from_pretrained(output).generation_config.eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("key", ["matrix_lr", "embedding_lr", "init_lr_fraction"])
def test_muon_s_keys_are_refused_where_trl_s_optimizer_trains(stage, key, start, tmp_path):
    folder = chatml_llama(tmp_path / "model")
    with pytest.raises(UserError, match=f"{key} would have no effect: a llama model .* learning_rate"):
        start(stage, folder, **{key: 0.1})
    assert not (tmp_path / "run" / stage).exists()


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("key", ["learning_rate", "optim", "adam_beta1"])
def test_trl_s_optimizer_s_keys_are_refused_where_muon_trains(stage, key, start, toy_model_folder):
    value = {"optim": "adamw_torch", "adam_beta1": 0.8}.get(key, 1e-3)
    with pytest.raises(UserError, match=f"{key} would have no effect: the optimizer is Muon.*set matrix_lr"):
        start(stage, toy_model_folder, **{key: value})


def test_an_optimizer_that_is_not_installed_is_one_line(start, tmp_path):
    with pytest.raises(UserError, match="the trainer rejects its settings: .*bitsandbytes"):
        start("sft", chatml_llama(tmp_path / "model"), optim="adamw_bnb_8bit")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_libraries_have_nothing_to_warn_of(stage, start, tmp_path, recwarn, caplog, monkeypatch):
    for library in ("transformers", "trl", "accelerate", "datasets", "peft"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    start(stage, qwen3(tmp_path / "model"), **LORA | ({"beta": 0.1} if stage == "rl" else {}))
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("adapter", [False, True])
def test_two_processes_train_another_model(stage, adapter, start, tmp_path):
    lora = LORA | {"lora_dropout": 0} if adapter else {"learning_rate": 1e-3}
    alone = start(stage, chatml_llama(tmp_path / "model"), "alone", per_device_train_batch_size=8, **lora)
    words = sys.argv[1:]
    words[words.index("--output_dir") + 1] = str(tmp_path / "together" / stage)
    words[words.index("--per_device_train_batch_size") + 1] = "4"
    assert run(forkserver(), words, stage={"rl": "grpo"}.get(stage, stage), processes=2) == 0
    expected, found = (load_file(path / "model.safetensors") for path in (alone, tmp_path / "together" / stage))
    if stage == "sft":  # rollouts are drawn anew in every process
        assert max((found[name] - expected[name]).abs().mean() for name in expected) < 1e-5


@pytest.mark.parametrize("make", [chatml_llama, qwen3])
def test_grpo_of_another_model_samples_by_its_template_and_without_the_tool(
    make, start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    folder = make(tmp_path / "model")
    output = start(
        "rl", folder, learning_rate=1e-2, beta=0.1, eval_files=tmp_path / "rl.jsonl", eval_samples=2, eval_problems=4
    )
    assert "no tokens for the python tool: completions are text only" in capsys.readouterr().out
    text = (output.parent / "logs" / "rl.completions.txt").read_text()
    assert "user: What is " in text and "assistant: " in text and "<|im_" not in text
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert [row["pass@2"] for row in log_of(output) if "pass@2" in row]
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(folder).chat_template


def test_grpo_generates_as_transformers_does_where_the_engine_cannot_decode(start, tmp_path, monkeypatch, capsys):
    def cannot(*args):
        raise AttributeError("this cache has no keys")

    monkeypatch.setattr(recipes.training.trl.rollouts, "engine_of", cannot)
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    folder = chatml_llama(tmp_path / "model")
    start("rl", folder)
    assert "from transformers' generate, not from the chat engine: this cache has no keys" in capsys.readouterr().out
    text = (tmp_path / "run" / "logs" / "rl.completions.txt").read_text()
    assert "=== step 2: alternating " in text and "assistant: " in text
    with pytest.raises(
        UserError, match=r"leave eval_files out: the chat engine cannot decode this model \(this cache"
    ):
        start("rl", folder, "evaluated", eval_files=tmp_path / "rl.jsonl")


def test_an_engine_that_computes_other_logits_is_no_reason_to_go_on_with_our_models(
    start, toy_model_folder, monkeypatch
):
    def differs(*args):
        raise UserError("the chat engine computes other logits")

    monkeypatch.setattr(recipes.training.trl.rollouts, "engine_of", differs)
    with pytest.raises(UserError, match="other logits"):
        start("rl", toy_model_folder)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_model_without_a_chat_template_is_refused_by_name(stage, start, tmp_path):
    with pytest.raises(UserError, match=r"model: the tokenizer has no chat template"):
        start(stage, gpt2(tmp_path / "model"))
    assert not (tmp_path / "run" / stage).exists()


def test_midtraining_refuses_another_model_by_name(start, tmp_path, monkeypatch):
    folder, files = chatml_llama(tmp_path / "model"), tmp_path / "sft.jsonl"
    monkeypatch.setattr(sys, "argv", ["midtrain.py", *midtrain_arguments(folder, files, tmp_path / "run" / "mid")])
    with pytest.raises(UserError, match=r"model: a llama model, which SFT and GRPO train, but not midtraining"):
        recipes.midtrain.main()


@pytest.fixture(params=["plain", "turbo", "llama", "qwen3"])
def any_model(request, tmp_path):
    if request.param in ("llama", "qwen3"):
        return {"llama": chatml_llama, "qwen3": qwen3}[request.param](tmp_path / "model")
    tokenizer = toy_tokenizer()
    for part in (random_model(request.param, vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_an_adapter_is_merged_into_a_whole_model(stage, any_model, start, monkeypatch):
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    output = start(stage, any_model, **LORA)
    before, after = load_file(any_model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not changed & {"model.embed_tokens.weight", "lm_head.weight"}
    load_model_and_tokenizer(output)
    assert not list(output.glob("adapter*"))


def test_an_adapter_alone_opens_with_its_base_model_and_computes_as_the_merged_one(start, tmp_path):
    folder = chatml_llama(tmp_path / "model")
    merged = start("sft", folder, "merged", **LORA, lora_modules_to_save="lm_head")
    alone = start("sft", folder, "alone", **LORA, lora_modules_to_save="lm_head", merge_adapter="false")
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert not (alone / "model.safetensors").exists()
    ids = torch.arange(3, 40)[None]
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (merged, alone)]
    models.append(AutoPeftModelForCausalLM.from_pretrained(alone).eval())
    first, *others = (model(ids).logits for model in models)
    assert all(torch.allclose(first, other, atol=1e-4) for other in others)
    assert AutoTokenizer.from_pretrained(alone).chat_template == CHATML
    card = (alone / "README.md").read_text()
    assert "library_name: peft" in card and "LoRA adapter" in card


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_with_an_adapter_goes_on_bit_identically(stage, start, tmp_path, monkeypatch):
    folder = chatml_llama(tmp_path / "model")
    settings = LORA | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 7}
    monkeypatch.setattr(recipes.training.trl.rewards, "exact_answer", alternating)
    undisturbed = start(stage, folder, "undisturbed", **settings)
    with monkeypatch.context() as stopped:
        stop_before_step(stopped, 4)
        with pytest.raises(KeyboardInterrupt):
            start(stage, folder, **settings)
    output = start(stage, folder, **settings, resume="auto")
    expected, found = load_file(undisturbed / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 4}, "lora_r has no effect unless use_peft is set"),
        ({"merge_adapter": "false"}, "merge_adapter has no effect unless use_peft is set"),
        (LORA | {"lora_r": 0}, "lora_r must be at least 1"),
        (LORA | {"lora_target_modules": "no_such"}, "the trainer rejects its settings: Target modules"),
        (LORA | {"lora_target_modules": "lm_head"}, "adapter to `lm_head` is not supported"),
        (LORA | {"matrix_lr": 0.1}, "matrix_lr would have no effect: an adapter is trained by TRL's optimizer"),
    ],
)
def test_settings_of_an_adapter_without_effect_are_refused(settings, message, start, toy_model_folder, tmp_path):
    with pytest.raises(UserError) as error:
        start("sft", toy_model_folder, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "sft").exists()


def test_without_peft_an_adapter_is_refused_in_one_line(start, toy_model_folder, monkeypatch):
    monkeypatch.setattr(recipes.training.trl.adapters, "is_peft_available", lambda: False)
    with pytest.raises(UserError, match="use_peft needs peft, which is not installed"):
        start("sft", toy_model_folder, **LORA)


def test_the_loss_of_an_adapter_that_diverges_names_its_own_rate(start, tmp_path):
    with pytest.raises(UserError, match="Lower learning_rate"):
        start("sft", chatml_llama(tmp_path / "model"), **LORA | {"learning_rate": 1e38, "max_steps": 4})
