"""Every key of TRL's and transformers' argument classes, in one of three lists: handled, passed on or refused.

The two classes have some 200 keys. Muon replaces their optimizer, the chat template and
`recipes/training/data/conversations.py` their data preparation, `recipes/training/stage.py` their model folder: keys
for these would be accepted without effect.
"""

import argparse
import json
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import yaml
from accelerate.utils.environment import parse_flag_from_env
from transformers import TrainingArguments
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig, SFTConfig, TrlParser

from modeling_nanochat.cli import config_path, parse
from modeling_nanochat.errors import UserError

from ..batch_size import is_out_of_memory
from ..device import several_on_cpu

# Keys that this repository handles itself, in both stages ...
HANDLED = {
    "output_dir",  # of the model; the trainer's own folder is beside it
    "push_to_hub", "hub_model_id", "hub_private_repo",  # the finished model folder, not the trainer's
    "resume_from_checkpoint",  # also `auto`
    "weight_decay",  # of Muon
    "seed",  # also used before the trainer exists
    "bf16", "dataloader_pin_memory",  # the default depends on the device
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # under the name of the installed transformers
    "activation_checkpointing", "activation_checkpointing_kwargs",
}  # fmt: skip
# ... and in one of the stages.
HANDLED_BY = {SFTConfig: {"max_length"}, GRPOConfig: {"log_completions"}}

# Keys that are passed to the trainer as given.
PASSED_ON = {
    # duration and rates
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "neftune_noise_alpha",
    # the machine
    "use_cpu", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps",
    "accelerator_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_timeout", "full_determinism",
    # data
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "shuffle_dataset", "pad_to_multiple_of",
    # logs
    "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "debug",
    # checkpoints
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "ignore_data_skip",
}  # fmt: skip
PASSED_ON_BY = {
    SFTConfig: {
        "include_num_input_tokens_seen", "loss_type", "average_tokens_across_devices", "packing", "packing_strategy",
        "dataset_num_proc", "dataloader_drop_last", "data_seed", "train_sampling_strategy",
    },
    GRPOConfig: {
        # rollouts
        "num_generations", "generation_batch_size", "steps_per_generation", "max_completion_length", "temperature",
        "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation",
        "max_tool_calling_iterations",
        # loss
        "beta", "num_iterations", "epsilon", "epsilon_high", "delta", "loss_type", "scale_rewards", "reward_weights",
        "multi_objective_aggregation", "importance_sampling_level", "mask_truncated_completions",
        "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl", "cast_lm_head_to_fp32",
        "sapo_temperature_neg", "sapo_temperature_pos",
        "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
        "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
        "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
        "entropy_target",
        # logs
        "num_completions_to_print", "log_unique_prompts",
    },
}  # fmt: skip

# Keys that would have no effect, or break a guarantee of this repository: what to do instead -> keys.
OPTIMIZER = "the optimizer is Muon with AdamW: set matrix_lr, embedding_lr, unembedding_lr or init_lr_fraction"
NO_EVALUATION = "there is no evaluation during training: run evals/evaluate_model.py afterwards, and leave it out"
LOADING = "model and tokenizer are loaded from model_name_or_path: leave it out"
COLUMNS = "train_files are read and rendered by the chat template: leave it out"
LAUNCHER = "the number of processes and the sharding are set by accelerate launch --config_file: leave it out"
HUB = "push_to_hub uploads the finished model once, with the account of `hf auth login`: leave it out"
PRECISION = "weights are float32, and bf16 chooses the precision: set bf16"
VLLM = "rollouts run in transformers, whose cache is checked first: leave it out"
INSTEAD = {
    OPTIMIZER: {
        "learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules",
    },
    NO_EVALUATION: {
        "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
        "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
        "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "label_names", "fp16_full_eval", "bf16_full_eval",
        "eval_packing", "num_generations_eval",
    },
    PRECISION: {"fp16"},
    LOADING: {
        "model_init_kwargs", "trust_remote_code", "eos_token", "pad_token", "chat_template_path",
        "chat_template_kwargs",
    },
    COLUMNS: {
        "remove_unused_columns", "length_column_name", "dataset_text_field", "dataset_kwargs", "log_multimodal",
    },
    LAUNCHER: {
        "fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ds3_gather_for_generation", "local_rank",
        "ddp_backend",
    },
    HUB: {
        "hub_token", "hub_strategy", "hub_always_push", "hub_revision", "log_completions_hub_repo",
    },
    VLLM: {
        "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
        "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
        "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    },
    "the loss is on the assistant's tokens only: recipes/midtrain.py trains on all tokens": {
        "assistant_only_loss", "completion_only_loss",
    },
    "longer conversations are skipped, none is cropped: set max_length": {"truncation_mode"},
    "the models have no such layers: leave it out": {"router_aux_loss_coef", "disable_dropout"},
    "there are no Liger kernels for these models: leave it out": {"use_liger_kernel", "liger_kernel_config"},
    "training uses no cache, and the finished model is saved with its cache on: leave it out": {"use_cache"},
    "set gradient_checkpointing": {"activation_offloading"},
    "set packing": {"padding_free"},
    "TRL will remove it, and the models' fused loss does not support it: leave it out": {"label_smoothing_factor"},
    "set per_device_train_batch_size": {"auto_find_batch_size"},
    "a loss that is not finite ends training: leave it out": {"logging_nan_inf_filter"},
    "checkpoints hold everything needed to resume: leave it out": {
        "save_only_model", "restore_callback_states_from_checkpoint",
    },
    "set save_strategy and save_steps": {"enable_jit_checkpoint"},
}  # fmt: skip
# GRPO has its own sampling of problems and its own loss reduction.
INSTEAD_BY = {
    SFTConfig: {},
    GRPOConfig: {
        "set loss_type": {"average_tokens_across_devices"},
        "set shuffle_dataset and seed": {"data_seed", "train_sampling_strategy"},
        "all tokens are counted: leave it out": {"include_num_input_tokens_seen"},
        "only whole batches are drawn: leave it out": {"dataloader_drop_last"},
    },
}

# Keys that are read only if another key has one of these values (empty: any but 0, false and none).
NEEDS: tuple[tuple[str, tuple, tuple[str, ...]], ...] = (
    ("packing", (), ("packing_strategy",)),
    ("save_strategy", ("steps",), ("save_steps",)),
    ("save_strategy", ("steps", "epoch"), ("save_total_limit", "save_on_each_node")),
    ("resume_from_checkpoint", (), ("ignore_data_skip",)),
    ("push_to_hub", (), ("hub_private_repo",)),
    ("gradient_checkpointing", (), ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")),
    ("logging_strategy", ("steps",), ("logging_steps",)),
    ("report_to", (), ("run_name", "project")),
    ("report_to", (["trackio"],), ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")),
    (
        "dataloader_num_workers",
        (),
        (
            "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
    ),
    ("log_completions", (), ("num_completions_to_print", "log_unique_prompts")),
    ("loss_type", ("grpo", "dapo", "bnpo", "dr_grpo", "luspo"), ("delta", "epsilon")),
    ("loss_type", ("grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo"), ("epsilon_high",)),
    ("loss_type", ("sapo",), ("sapo_temperature_neg", "sapo_temperature_pos")),
    ("loss_type", ("vespo",), ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")),
    ("beta", (), ("sync_ref_model", "use_bias_correction_kl")),
    ("sync_ref_model", (), ("ref_model_mixup_alpha", "ref_model_sync_steps")),
    ("use_adaptive_entropy", (), ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")),
)  # fmt: skip

# Values that the libraries check only during training, if at all.
CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "cache_implementation": ALL_CACHE_IMPLEMENTATIONS,
    "save_strategy": ("no", "steps", "epoch"),  # `best` needs an evaluation
}
LOSSES = {
    SFTConfig: ("nll", "dft"),  # `chunked_nll` is TRL's old name for `nll`
    GRPOConfig: ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
}
DICTIONARIES = {
    "lr_scheduler_kwargs", "generation_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
}  # fmt: skip
TINY = math.ulp(0.0)  # excludes 0
RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit", "pad_to_multiple_of",
            "max_length", "dataset_num_proc", "max_completion_length", "generation_batch_size", "steps_per_generation",
            "num_iterations", "num_completions_to_print", "ref_model_sync_steps", "dataloader_prefetch_factor",
            "ddp_timeout", "max_tool_calling_iterations",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "seed", "data_seed", "top_k",
            "beta", "epsilon", "epsilon_high", "entropy_coef", "entropy_coef_min", "entropy_coef_delta",
            "neftune_noise_alpha", "matrix_lr", "embedding_lr", "unembedding_lr",
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(
        (
            "num_train_epochs", "logging_steps", "save_steps", "temperature", "repetition_penalty", "init_lr_fraction",
            "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos",
        ),
        (TINY, math.inf),
    ),
    **dict.fromkeys(("top_p", "top_entropy_quantile"), (TINY, 1)),
    **dict.fromkeys(("min_p", "ref_model_mixup_alpha"), (0, 1)),
    "num_generations": (2, math.inf),
}  # fmt: skip


def fill_device_defaults(settings: TrainingArguments) -> None:
    """Fill in unset values before the libraries do, which assume that bfloat16 and pinned memory are available.

    Raises:
        ValueError: bf16 is set on a device without it.
    """
    settings.use_cpu = settings.use_cpu or several_on_cpu()
    able = settings.use_cpu or is_torch_bf16_gpu_available()
    if settings.bf16 is None:
        settings.bf16 = able and not settings.use_cpu
    elif settings.bf16 and not able:
        raise ValueError("bf16 is not available on this device: leave it out, or set use_cpu to use it on the CPU")
    if settings.dataloader_pin_memory is None:
        settings.dataloader_pin_memory = torch.cuda.is_available() and not settings.use_cpu
    if settings.ddp_find_unused_parameters is None:
        settings.ddp_find_unused_parameters = False  # all parameters are used; searching takes time
    if hasattr(settings, "activation_checkpointing"):  # transformers 5.24 renamed it, and warns about the old name
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            value = getattr(settings, new)
            setattr(settings, new, getattr(settings, old) if value is None else value)
            setattr(settings, old, None)


@dataclass
class DeviceDefaults:
    """Settings of both stages whose defaults differ from the libraries'."""

    bf16: bool | None = field(default=None, metadata={"help": "Train in bfloat16; default: if the GPU supports it."})
    dataloader_pin_memory: bool | None = field(default=None, metadata={"help": "Default: if there is a CUDA GPU."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )


@dataclass
class SFTSettings(DeviceDefaults, SFTConfig):
    """`trl.SFTConfig` that starts on any device."""

    max_length: int | None = field(default=None, metadata={"help": "Tokens per row; default: the context length."})

    def __post_init__(self) -> None:
        fill_device_defaults(self)
        super().__post_init__()


@dataclass
class GRPOSettings(DeviceDefaults, GRPOConfig):
    """`trl.GRPOConfig` that starts on any device."""

    def __post_init__(self) -> None:
        fill_device_defaults(self)
        super().__post_init__()


def parse_settings(
    arguments: type, settings: type, args: Sequence[str] | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Parse command line and --config file into instances of both classes and a dictionary of the given keys.

    Args:
        arguments: The stage's own dataclass.
        settings: [`SFTSettings`] or [`GRPOSettings`].

    Raises:
        UserError: A given key would have no effect, or a value is out of range; the message names the key.
    """
    words = list(sys.argv[1:] if args is None else args)
    given = given_values((arguments, settings), words)
    base = SFTConfig if issubclass(settings, SFTConfig) else GRPOConfig
    refuse_without_effect(given, base, own={option.name for option in fields(arguments)})
    check_values(given, base)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError(
            "fsdp: SFT and GRPO keep a full model on each process; launch with accelerate_configs/ddp_8gpu.yaml"
        )
    with settings_errors():
        parsed, filled = parse(arguments, settings, args=words)
    check_trackers(filled.report_to)
    for other, values, keys in NEEDS:
        value = getattr(filled, other, None)
        if not (value in values if values else value) and (useless := [key for key in keys if key in given]):
            wanted = " or ".join(word if isinstance(word, str) else word[0] for word in values) or "set"
            raise UserError(f"{useless[0]} has no effect unless {other} is {wanted}: set that, or leave it out")
    return parsed, filled, given


def given_values(dataclass_types: Sequence[type], words: list[str]) -> dict[str, Any]:
    """Key -> value of everything in the --config file or on the command line, even if it equals the default.

    Empty if the parser rejects something: [`parse`] reports it.
    """

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(dataclass_types)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    try:
        if config := config_path(words):
            with open(config, encoding="utf-8") as file:
                content = yaml.safe_load(file)
            parser.set_defaults(**{key: value for key, value in content.items() if key != "env"})
        return vars(parser.parse_known_args(words)[0])
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def refuse_without_effect(given: Collection[str], base: type, own: Collection[str]) -> None:
    """Raise [`UserError`] for the first key that is neither the stage's own, nor handled, nor passed on."""
    allowed = HANDLED | HANDLED_BY[base] | PASSED_ON | PASSED_ON_BY[base]
    instead = {key: text for lists in (INSTEAD, INSTEAD_BY[base]) for text, keys in lists.items() for key in keys}
    for key in given:
        if key not in allowed and key not in own:
            unknown = f"this key of the installed {base.__module__.split('.')[0]} is untested here: leave it out"
            raise UserError(f"{key} would have no effect: {instead.get(key, unknown)}")


def check_values(given: dict[str, Any], base: type) -> None:
    """Raise [`UserError`] for the first value that the libraries would reject late or with a traceback."""
    if given.get("max_steps", 1) < 1 and given["max_steps"] != -1:
        raise UserError(f"max_steps {given['max_steps']} trains nothing: give at least 1, or -1 for num_train_epochs")
    for key, value in given.items():
        if key in RANGES and isinstance(value, int | float):
            low, high = RANGES[key]
            if not low <= value <= high or math.isinf(value):
                bounds = "more than 0" if low == TINY else f"at least {low}"
                bounds += "" if math.isinf(high) else f" and at most {high}"
                raise UserError(f"{key} must be {bounds}, not {value}")
        choices = LOSSES[base] if key == "loss_type" else CHOICES.get(key)
        if choices and value is not None and value not in choices:
            raise UserError(f"{key} {value}: there are only {', '.join(choices)}")
        if key in DICTIONARIES and isinstance(value, str):
            check_dictionary(key, value)


def check_dictionary(key: str, text: str) -> None:
    try:
        is_dictionary = isinstance(json.loads(text), dict)
    except ValueError:
        is_dictionary = False
    if not is_dictionary:
        raise UserError(f"{key} must be a JSON object, such as '{{\"name\": 1}}', not {text!r}")


def check_trackers(names: list[str]) -> None:
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"report_to {' '.join(names)}: {' '.join(str(error).split())}") from error


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn a library's errors about its settings into a [`UserError`]."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the trainer rejects its settings: {' '.join(str(error).split())}") from error
