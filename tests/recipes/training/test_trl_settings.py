"""Every key of TRL's argument classes: handled with an effect, read by the trainer as given, or rejected by name."""

import json
import math
from collections import Counter
from dataclasses import MISSING, fields

import pytest
import torch
import yaml
from training import render
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig, SFTConfig

from modeling_nanochat.errors import UserError
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.grpo import GRPOArguments, NanoChatGRPOTrainer, read_problems
from recipes.sft import NanoChatSFTTrainer, SFTArguments, token_dataset
from recipes.training.data.bad_rows import BadRows
from recipes.training.trl import keys as trl_keys
from recipes.training.trl import settings as trl_settings
from recipes.training.trl.rewards import exact_answer
from recipes.training.trl.settings import GRPOSettings, SFTSettings, parse_settings

STAGES = {"sft": (SFTArguments, SFTSettings, SFTConfig), "grpo": (GRPOArguments, GRPOSettings, GRPOConfig)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # not in transformers 5.17
# Every key that is passed on, with a value that is not its default.
SHARED_EXAMPLES = {
    "num_train_epochs": "2.5", "max_steps": "7", "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "2", "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}', "warmup_steps": "3.0", "max_grad_norm": "0.5",
    "neftune_noise_alpha": "2.0", "use_cpu": "true", "tf32": "false", "torch_compile": "true",
    "torch_compile_backend": "eager", "torch_compile_mode": "default", "torch_empty_cache_steps": "5",
    "accelerator_config": '{"even_batches": false}', "ddp_find_unused_parameters": "true", "ddp_bucket_cap_mb": "12",
    "ddp_broadcast_buffers": "false", "ddp_static_graph": "true", "ddp_timeout": "60", "full_determinism": "true",
    "dataloader_num_workers": "1", "dataloader_persistent_workers": "true", "dataloader_prefetch_factor": "3",
    "dataloader_multiprocessing_context": "fork", "dataloader_in_order": "false", "pad_to_multiple_of": "8",
    "logging_strategy": "epoch", "logging_steps": "3", "logging_first_step": "true",
    "log_level": "error", "log_level_replica": "error",
    "log_on_each_node": "false", "disable_tqdm": "true", "report_to": "tensorboard", "run_name": "mine",
    "project": "ours", "trackio_space_id": "me/space", "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/static", "skip_memory_metrics": "false", "debug": "underflow_overflow",
    "save_strategy": "epoch", "save_steps": "9",
    "ignore_data_skip": "true",
}  # fmt: skip
EXAMPLES = {
    "sft": SHARED_EXAMPLES | {
        "shuffle_dataset": "true", "include_num_input_tokens_seen": "true", "loss_type": "dft",
        "average_tokens_across_devices": "false", "packing": "false",
        "dataset_num_proc": "1", "dataloader_drop_last": "true", "data_seed": "5",
        "train_sampling_strategy": "group_by_length",
    },
    "grpo": SHARED_EXAMPLES | {
        "shuffle_dataset": "false", "num_generations": "4", "generation_batch_size": "16", "steps_per_generation": "2",
        "max_completion_length": "6", "temperature": "0.7", "top_p": "0.9", "top_k": "9", "min_p": "0.01",
        "repetition_penalty": "1.1", "max_tool_calling_iterations": "2", "beta": "0.1", "num_iterations": "2",
        "epsilon": "0.1", "epsilon_high": "0.3", "delta": "2.0", "loss_type": "bnpo", "scale_rewards": "batch",
        "reward_weights": "2.0", "multi_objective_aggregation": "normalize_then_sum",
        "importance_sampling_level": "sequence", "mask_truncated_completions": "true", "top_entropy_quantile": "0.5",
        "off_policy_mask_threshold": "0.5", "use_bias_correction_kl": "false", "cast_lm_head_to_fp32": "true",
        "sapo_temperature_neg": "1.2", "sapo_temperature_pos": "1.1", "vespo_k_pos": "2.5", "vespo_lambda_pos": "2.6",
        "vespo_k_neg": "2.7", "vespo_lambda_neg": "2.8",
        "sync_ref_model": "true", "ref_model_mixup_alpha": "0.5", "ref_model_sync_steps": "3",
        "entropy_coef": "0.01", "use_adaptive_entropy": "true", "entropy_coef_min": "0.001", "entropy_coef_max": "0.5",
        "entropy_coef_delta": "0.002", "entropy_target": "0.3",
    },
}  # fmt: skip
# Keys that are not passed on, and are read only beside another.
HANDLED_EXAMPLES = {
    "packing_strategy": "bfd", "per_device_eval_batch_size": "4", "eval_tasks_steps": "9", "max_examples": "9",
    "max_new_tokens": "9",
    "num_completions_to_print": "1", "eval_steps": "5", "eval_samples": "4", "eval_problems": "9",
    "vllm_mode": "colocate", "vllm_model_impl": "transformers", "vllm_enable_sleep_mode": "true",
    "vllm_gpu_memory_utilization": "0.5", "vllm_max_model_length": "512", "vllm_tensor_parallel_size": "2",
    "vllm_importance_sampling_correction": "false", "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": "2.0", "vllm_importance_sampling_clip_min": "0.1",
    "transformers_continuous_batching_config": "{}",
    "lora_r": "8", "lora_alpha": "8", "lora_dropout": "0.1",
}  # fmt: skip
# What a key needs beside it, to be read at all.
BESIDE = {
    "logging_steps": {"logging_strategy": "steps"},
    "run_name": {"report_to": "tensorboard"}, "project": {"report_to": "tensorboard"},
    "trackio_space_id": {"report_to": "trackio"}, "trackio_bucket_id": {"report_to": "trackio"},
    "trackio_static_space_id": {"report_to": "trackio"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr"},
    "dataloader_persistent_workers": {"dataloader_num_workers": "1"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": "1"},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": "1"},
    "dataloader_in_order": {"dataloader_num_workers": "1"},
    "save_steps": {"save_strategy": "steps"}, "ignore_data_skip": {"resume": "auto"},
    "sync_ref_model": {"beta": "0.1"},
    "use_bias_correction_kl": {"beta": "0.1"},
    "ref_model_mixup_alpha": {"beta": "0.1", "sync_ref_model": "true"},
    "ref_model_sync_steps": {"beta": "0.1", "sync_ref_model": "true"},
    "sapo_temperature_neg": {"loss_type": "sapo"}, "sapo_temperature_pos": {"loss_type": "sapo"},
    "entropy_coef_min": {"use_adaptive_entropy": "true"}, "entropy_coef_max": {"use_adaptive_entropy": "true"},
    "entropy_coef_delta": {"use_adaptive_entropy": "true"}, "entropy_target": {"use_adaptive_entropy": "true"},
} | {f"vespo_{name}": {"loss_type": "vespo"} for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}  # fmt: skip


def lists_of(config: type) -> tuple[set[str], set[str], set[str]]:
    """Keys that are handled, passed on, refused."""
    handled = trl_keys.HANDLED | trl_keys.HANDLED_BY[config]
    passed_on = trl_keys.PASSED_ON | trl_keys.PASSED_ON_BY[config]
    refused = set().union(*trl_keys.INSTEAD.values(), *trl_keys.INSTEAD_BY[config].values())
    return handled, passed_on, refused


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_the_installed_libraries_is_in_one_list(stage):
    _, settings, config = STAGES[stage]
    known = {one.name for one in fields(config)}
    in_lists = Counter(key for keys in lists_of(config) for key in keys)
    assert known - in_lists.keys() == set()
    assert [key for key, times in in_lists.items() if times > 1] == []
    assert {one.name for one in fields(settings)} == known
    assert set(EXAMPLES[stage]) == lists_of(config)[1]


def test_no_list_has_a_key_that_the_libraries_do_not_have():
    known = {one.name for _, _, config in STAGES.values() for one in fields(config)}
    listed = {key for _, _, config in STAGES.values() for keys in lists_of(config) for key in keys}
    assert listed - known <= NEWER
    assert trl_keys.RANGES.keys() | trl_keys.CHOICES.keys() <= listed | {
        one.name for arguments, _, _ in STAGES.values() for one in fields(arguments)
    }


def words(**settings: object) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def examples(toy_model_folder, tmp_path):
    """A model and files for a few steps."""
    chats = [
        {"messages": [{"role": "user", "content": f"{i}+7?"}, {"role": "assistant", "content": f"It is {i + 7}."}]}
        for i in range(16)
    ]
    problems = [{"question": f"What is {i}+7?", "answer": f"#### {i + 7}"} for i in range(16)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return {
        "sft": {"train_files": tmp_path / "chats.jsonl", "max_length": 256, "per_device_train_batch_size": 4},
        "grpo": {
            "train_files": tmp_path / "problems.jsonl",
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "max_completion_length": 6,
        },
    }, {"model_name_or_path": toy_model_folder, "output_dir": tmp_path / "run" / "out", "save_strategy": "no"}


def live_trainer(stage: str, examples, reward=exact_answer, **settings):
    special, common = examples
    arguments, config, _ = STAGES[stage]
    args, training, _ = parse_settings(arguments, config, words(**common | special[stage] | settings))
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    made = {"model": model, "args": training, "processing_class": tokenizer, "muon_rates": args.scaled()}
    if stage == "grpo":
        problems = read_problems(args.train_files, BadRows())
        return NanoChatGRPOTrainer(train_dataset=problems, reward_funcs=reward, **made)
    chats = [json.loads(line) for line in open(args.train_files[0])]
    rows = token_dataset(render(chats, tokenizer, 256, show_progress=False))
    return NanoChatSFTTrainer(train_dataset=rows, **made)


KEYS = [(stage, key) for stage, keys in EXAMPLES.items() for key in keys]


@pytest.mark.parametrize(("stage", "key"), KEYS)
def test_what_is_passed_on_arrives_at_the_trainer(stage, key, examples, monkeypatch):
    for module in ("recipes.training.trl.settings", "transformers.trainer"):  # no tracker is installed
        monkeypatch.setattr(f"{module}.get_reporting_integration_callbacks", lambda names: [])
    trainer = live_trainer(stage, examples, **BESIDE.get(key, {}) | {key: EXAMPLES[stage][key]})
    assert as_given(getattr(trainer.args, key)) == EXAMPLES[stage][key]


def as_given(value: object) -> str:
    """A value of the trainer's arguments in the words of the command line."""
    if isinstance(value, AcceleratorConfig):
        value = {"even_batches": value.even_batches}
    if isinstance(value, list):
        (value,) = value
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return {"all": "true"}.get(value, str(getattr(value, "value", value)))


@pytest.mark.parametrize("stage", STAGES)
def test_what_has_no_effect_is_refused_by_name_even_at_its_default(stage, tmp_path):
    arguments, settings, config = STAGES[stage]
    for one in fields(config):
        if one.name in lists_of(config)[2]:
            default = one.default_factory() if one.default is MISSING else one.default
            (tmp_path / "one.yaml").write_text(yaml.safe_dump({"output_dir": "out", one.name: default}))
            with pytest.raises(UserError) as refusal:
                parse_settings(arguments, settings, ["--config", str(tmp_path / "one.yaml")])
            assert str(refusal.value).startswith(f"{one.name} would have no effect: ")
            assert "is untested" not in str(refusal.value)


@pytest.mark.parametrize("word", ["--label_smoothing_factor=1e-3", "--label-smoothing-factor", "--label_s"])
def test_no_spelling_of_a_key_gets_past(word):
    value = [] if "=" in word else ["1e-3"]
    with pytest.raises(UserError, match="label_smoothing_factor would have no effect"):
        parse_settings(SFTArguments, SFTSettings, ["--output_dir", "out", word, *value])


def test_a_configuration_file_is_held_to_the_same(tmp_path):
    (tmp_path / "sft.yaml").write_text("output_dir: out\nfp16: true\n")
    with pytest.raises(UserError, match="fp16 would have no effect"):
        parse_settings(SFTArguments, SFTSettings, ["--config", str(tmp_path / "sft.yaml")])


def test_a_key_that_came_with_a_newer_library_is_refused_until_it_was_tried(monkeypatch):
    for name in ("PASSED_ON", "HANDLED"):
        monkeypatch.setattr(trl_keys, name, getattr(trl_keys, name) - {"max_grad_norm"})
    with pytest.raises(UserError, match="max_grad_norm would have no effect: this key .* is untested"):
        parse_settings(SFTArguments, SFTSettings, words(output_dir="out", max_grad_norm=1))


def has(stage: str, others: str) -> bool:
    arguments, settings, _ = STAGES[stage]
    return bool(set(others.split(" or ")) & {each.name for each in (*fields(arguments), *fields(settings))})


@pytest.mark.parametrize("other, values, keys", trl_keys.NEEDS)
def test_what_nothing_reads_without_another_key_is_refused(other, values, keys):
    off = {
        "packing": "false",
        "loss_type": "cispo" if "cispo" not in values else "sapo",
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "log_completions": "false",
    }
    own = {stage: {option.name for option in fields(arguments)} for stage, (arguments, _, _) in STAGES.items()}
    for key in keys:
        if key in NEWER and key not in {one.name for one in fields(SFTConfig)}:
            continue
        stage = next(
            stage
            for stage in STAGES
            if key in EXAMPLES[stage].keys() | lists_of(STAGES[stage][2])[0] | own[stage] and has(stage, other)
        )
        value = (EXAMPLES[stage] | HANDLED_EXAMPLES).get(
            key, '{"use_reentrant": false}' if key.endswith("kwargs") else "true"
        )
        arguments, settings, _ = STAGES[stage]
        given = words(output_dir="out", **{key: value}) + (words(**{other: off[other]}) if other in off else [])
        with pytest.raises(UserError, match=rf"{key} (has no effect|can only be set).* (--)?{other} "):
            parse_settings(arguments, settings, given)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("sft", {"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ("sft", {"max_steps": 0}, "max_steps 0 trains nothing"),
        ("sft", {"max_steps": -3}, "max_steps -3 trains nothing"),
        ("sft", {"num_train_epochs": 0}, "num_train_epochs must be more than 0"),
        ("sft", {"eval_strategy": "steps"}, "eval_strategy would have no effect: evaluation is"),
        ("sft", {"matrix_lr": "nan"}, "matrix_lr must be at least 0, not nan"),
        ("sft", {"init_lr_fraction": "inf"}, "init_lr_fraction must be more than 0, not inf"),
        ("sft", {"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ("sft", {"loss_type": "grpo"}, "loss_type"),
        ("sft", {"lr_scheduler_type": "liner"}, "lr_scheduler_type"),
        ("sft", {"lr_scheduler_kwargs": "fast"}, "lr_scheduler_kwargs must be a JSON object"),
        ("sft", {"save_strategy": "best"}, "save_strategy best: there are only no, steps, epoch"),
        ("sft", {"report_to": "wandbb"}, "report_to wandbb: "),
        ("sft", {"accelerator_config": "nowhere.json"}, "nowhere.json"),
        ("grpo", {"vllm_mode": "server"}, "vllm_mode server: there are only colocate"),
        ("grpo", {"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization has no effect unless use_vllm is"),
        ("grpo", {"eval_steps": 5}, "eval_steps has no effect unless eval_files is set"),
        ("grpo", {"temperature": 0}, "temperature must be more than 0, not 0"),
        ("grpo", {"max_completion_length": 0}, "max_completion_length must be at least 1, not 0"),
        ("grpo", {"num_generations": 1}, "num_generations must be at least 2, not 1"),
        ("grpo", {"num_generations": 3, "gradient_accumulation_steps": 1}, "divisible by num_generations (3)"),
        ("grpo", {"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ("grpo", {"per_device_train_batch_size": -8}, "per_device_train_batch_size must be at least 1"),
        ("grpo", {"top_p": 1.5}, "top_p must be more than 0 and at most 1, not 1.5"),
        ("grpo", {"loss_type": "ppo"}, "loss_type ppo: there are only per_problem, grpo, "),
        ("grpo", {"scale_rewards": "sometimes"}, "scale_rewards sometimes: there are only group, batch, none"),
        (
            "grpo",
            {"cache_implementation": "static"},
            "cache_implementation would have no effect: completions come from the chat engine",
        ),
        ("grpo", {"generation_batch_size": 8, "steps_per_generation": 1}, "can not be both configured"),
    ],
)
def test_an_impossible_value_is_one_line_that_names_its_key(stage, settings, message):
    arguments, config, _ = STAGES[stage]
    with pytest.raises(UserError) as refusal:
        parse_settings(arguments, config, words(output_dir="out", **settings))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_launch_that_shards_the_model_is_refused(stage, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments, config, _ = STAGES[stage]
    with pytest.raises(
        UserError, match="keep a full model on each process; launch with accelerate_configs/ddp_8gpu.yaml"
    ):
        parse_settings(arguments, config, words(output_dir="out"))


@pytest.mark.parametrize("able", [False, True])
def test_the_device_decides_what_is_not_set(able, monkeypatch):
    monkeypatch.setattr(SFTSettings, "device", torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: able)
    for module in (trl_settings.__name__, "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: able)
    for more, expected in (({}, able), ({"use_cpu": "true"}, False), ({"bf16": "false"}, False)):
        _, training, _ = parse_settings(SFTArguments, SFTSettings, words(output_dir="out", **more))
        assert training.bf16 == expected
        assert training.dataloader_pin_memory == (able and "use_cpu" not in more)


def test_grpo_starts_on_this_device():
    _, training, _ = parse_settings(GRPOArguments, GRPOSettings, words(output_dir="out"))
    assert training.bf16 == trl_settings.is_torch_bf16_gpu_available()


def test_bfloat16_where_there_is_none_is_one_line(monkeypatch):
    monkeypatch.setattr(trl_settings, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(UserError, match="^bf16 is not available on this device"):
        parse_settings(SFTArguments, SFTSettings, words(output_dir="out", bf16="true"))


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_is_on_under_either_of_its_names(key, examples, recwarn):
    if key not in {one.name for one in fields(SFTConfig)}:
        pytest.skip("the installed transformers has one name only")
    trainer = live_trainer("sft", examples, **{key: "true", "max_steps": 1})
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
    trainer.train()
    assert any(
        module.gradient_checkpointing
        for module in trainer.model.modules()
        if hasattr(module, "gradient_checkpointing")
    )


def test_weight_decay_is_muons(examples):
    optimizer = live_trainer("sft", examples, weight_decay=0.25).create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups if group["kind"] == "muon"] == [0.25]


def alternating(completions, **kwargs):
    return [float(number % 2) for number in range(len(completions))]


@pytest.mark.parametrize("loss_type", trl_keys.LOSSES[GRPOConfig])
def test_every_loss_of_grpo_that_is_offered_trains(loss_type, examples):
    settings = {"loss_type": loss_type, "max_steps": 2, "logging_steps": 1, "disable_tqdm": "true"}
    trainer = live_trainer("grpo", examples, reward=alternating, **settings)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    changed = {
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == before.keys()
