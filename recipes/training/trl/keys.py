"""Every key of TRL's and transformers' argument classes, in one of three lists: handled, passed on or refused.

The two classes have some 200 keys. Muon replaces their optimizer, the chat template and
`recipes/training/data/conversations.py` their data preparation, `recipes/training/stage.py` their model folder: keys
for these would be accepted without effect. `recipes/training/trl/settings.py` checks what is given by these lists.
"""

import math

from trl import GRPOConfig, SFTConfig

# Keys that this repository handles itself, in both stages ...
HANDLED = {
    "output_dir",  # of the model; the trainer's own folder is beside it
    "push_to_hub", "hub_model_id", "hub_private_repo",  # the finished model folder, not the trainer's
    "weight_decay",  # of Muon
    "seed",  # also used before the trainer exists
    "bf16", "dataloader_pin_memory",  # the default depends on the device
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # under the name of the installed transformers
    "activation_checkpointing", "activation_checkpointing_kwargs",
}  # fmt: skip
# Keys of TRL's optimizer, refused where Muon trains: `recipes/training/trl/optimizers.py`.
OPTIMIZER = {"learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"}
HANDLED |= OPTIMIZER
# ... and in one of the stages.
HANDLED_BY = {
    SFTConfig: {
        "max_length",
        "eval_steps", "per_device_eval_batch_size",  # of our evaluations
        "packing_strategy",
    },
    GRPOConfig: {
        "log_completions", "num_completions_to_print",  # as text
        "eval_steps",  # on eval_files
        # TRL's generation in place of the chat engine; live trainers of the tests have neither vLLM nor a GPU
        "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
        "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    },
}  # fmt: skip

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
    "save_strategy", "save_steps", "ignore_data_skip",
}  # fmt: skip
PASSED_ON_BY = {
    SFTConfig: {
        "include_num_input_tokens_seen", "loss_type", "average_tokens_across_devices", "packing",
        "dataset_num_proc", "dataloader_drop_last", "data_seed", "train_sampling_strategy",
    },
    GRPOConfig: {
        # rollouts
        "num_generations", "generation_batch_size", "steps_per_generation", "max_completion_length", "temperature",
        "top_p", "top_k", "min_p", "repetition_penalty", "max_tool_calling_iterations",
        # loss
        "beta", "num_iterations", "epsilon", "epsilon_high", "delta", "loss_type", "scale_rewards", "reward_weights",
        "multi_objective_aggregation", "importance_sampling_level", "mask_truncated_completions",
        "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl", "cast_lm_head_to_fp32",
        "sapo_temperature_neg", "sapo_temperature_pos",
        "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
        "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
        "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
        "entropy_target",
    },
}  # fmt: skip

# Keys that would have no effect, or break a guarantee of this repository: what to do instead -> keys.
MUON = "the optimizer is Muon with AdamW: set matrix_lr, embedding_lr, unembedding_lr or init_lr_fraction"
NO_EVALUATION = "evaluation is by validation_mixture and eval_tasks in SFT, by eval_files in GRPO: leave it out"
LOADING = "model and tokenizer are loaded from model_name_or_path: leave it out"
COLUMNS = "train_files are read and rendered by the chat template: leave it out"
LAUNCHER = "the number of processes and the sharding are set by accelerate launch --config_file: leave it out"
HUB = "push_to_hub uploads the finished model once, with the account of `hf auth login`: leave it out"
PRECISION = "weights are float32, and bf16 chooses the precision: set bf16"
VLLM = "vLLM runs in the processes of the training, and samples freely: leave it out"
INSTEAD = {
    "no such optimizer was tried here: leave it out, or set use_peft": {"optim_target_modules"},
    NO_EVALUATION: {
        "do_train", "do_eval", "do_predict", "eval_strategy", "eval_delay", "prediction_loss_only", "eval_on_start",
        "eval_do_concat_batches", "eval_use_gather_object",
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
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_structured_outputs_regex", "vllm_importance_sampling_cap",
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
    "set resume": {"resume_from_checkpoint"},
    "the two newest checkpoints are kept, on storage that all machines share: leave it out": {
        "save_total_limit", "save_on_each_node",
    },
    "checkpoints hold everything needed to resume: leave it out": {
        "save_only_model", "restore_callback_states_from_checkpoint",
    },
    "set save_strategy and save_steps": {"enable_jit_checkpoint"},
}  # fmt: skip
# GRPO has its own sampling of problems and its own loss reduction.
INSTEAD_BY = {
    SFTConfig: {},
    GRPOConfig: {
        "evaluation takes batches as large as the rollouts': leave it out": {"per_device_eval_batch_size"},
        "completions are logged as text: set num_completions_to_print": {"log_unique_prompts"},
        "set loss_type": {"average_tokens_across_devices"},
        "set shuffle_dataset and seed": {"data_seed", "train_sampling_strategy"},
        "all tokens are counted: leave it out": {"include_num_input_tokens_seen"},
        "only whole batches are drawn: leave it out": {"dataloader_drop_last"},
        "completions come from the chat engine: set temperature, top_k, top_p, min_p or repetition_penalty": {
            "generation_kwargs",
            "cache_implementation",
        },
    },
}

# Keys that are read only if another key, or one of several, has one of these values (empty: any but 0, false, none).
NEEDS: tuple[tuple[str, tuple, tuple[str, ...]], ...] = (
    ("packing", (), ("packing_strategy",)),
    ("save_strategy", ("steps",), ("save_steps",)),
    ("resume", (), ("ignore_data_skip",)),
    ("push_to_hub", (), ("hub_private_repo",)),
    (
        "use_peft",
        (),
        (
            "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters",
            "lora_modules_to_save", "use_rslora", "use_dora", "merge_adapter",
        ),
    ),
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
    ("log_completions", (), ("num_completions_to_print",)),
    ("eval_files", (), ("eval_steps", "eval_samples", "eval_problems")),
    ("validation_mixture or validation_share", (), ("eval_steps",)),
    ("eval_tasks", (), ("eval_tasks_steps", "max_examples", "max_new_tokens")),
    ("validation_mixture or validation_share or eval_tasks", (), ("per_device_eval_batch_size",)),
    (
        "use_vllm",
        (),
        (
            "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
            "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        ),
    ),
    ("use_transformers_continuous_batching", (), ("transformers_continuous_batching_config",)),
    ("loss_type", ("per_problem", "grpo", "dapo", "bnpo", "dr_grpo", "luspo"), ("delta", "epsilon")),
    ("loss_type", ("per_problem", "grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo"), ("epsilon_high",)),
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
    "vllm_mode": ("colocate",),
    "packing_strategy": ("bfd",),  # the others cut conversations, or let them see each other
    "save_strategy": ("no", "steps", "epoch"),  # `best` needs an evaluation
}
LOSSES = {
    SFTConfig: ("nll", "dft"),  # `chunked_nll` is TRL's old name for `nll`
    GRPOConfig: ("per_problem", "grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
}
DICTIONARIES = {
    "lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
}  # fmt: skip
TINY = math.ulp(0.0)  # excludes 0
RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "gradient_accumulation_steps", "pad_to_multiple_of",
            "max_length", "dataset_num_proc", "max_completion_length", "generation_batch_size", "steps_per_generation",
            "num_iterations", "num_completions_to_print", "ref_model_sync_steps", "dataloader_prefetch_factor",
            "ddp_timeout", "max_tool_calling_iterations", "eval_steps", "eval_samples", "eval_problems",
            "eval_tasks_steps", "max_examples", "max_new_tokens", "per_device_eval_batch_size", "lora_r", "lora_alpha",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "seed", "data_seed", "top_k",
            "beta", "epsilon", "epsilon_high", "entropy_coef", "entropy_coef_min", "entropy_coef_delta",
            "neftune_noise_alpha", "matrix_lr", "embedding_lr", "unembedding_lr", "learning_rate", "adam_epsilon",
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
    **dict.fromkeys(("min_p", "ref_model_mixup_alpha", "lora_dropout", "adam_beta1", "adam_beta2"), (0, 1)),
    "num_generations": (2, math.inf),
}  # fmt: skip
