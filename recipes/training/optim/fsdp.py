"""FSDP2: one model sharded over all processes, if weights, gradients and state do not fit on each device."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.errors import UserError


def shard_model(model: NanoChatForCausalLM, accelerator: Accelerator) -> None:
    """Shard `model` in place, by the launch file's `fsdp_config`: one unit per decoder layer, and one for the rest.

    `accelerator.prepare` would average gradients in bfloat16 and round the loss to it. It would also make the head a
    separate unit, whose weight is gathered only while the head is called; the chunked loss reads the weight directly.

    Raises:
        UserError: `fsdp_cpu_ram_efficient_loading` is set.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise UserError("fsdp_cpu_ram_efficient_loading: here every process builds the full model; set it to false")
    if plugin.activation_checkpointing:
        recompute_layers(model)
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": mixed_precision_policy(accelerator.mixed_precision),
        "offload_policy": plugin.cpu_offload,
    }
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    # Always resharded: an evaluation would otherwise leave the head gathered between passes.
    fully_shard(model, reshard_after_forward=True, **options)


def mixed_precision_policy(precision: str) -> MixedPrecisionPolicy:
    """Gather and compute in bfloat16, reduce gradients in float32, and do not cast outputs such as the loss."""
    if precision == "no":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def recompute_layers(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing, which transformers 5.24 renamed."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the first argument under either name


def forget_failed_pass(module: nn.Module) -> bool:
    """Reset `module` after a pass that raised an exception; False if that is not possible.

    The next pass's gradients of a sharded module may still include some of the failed pass: drop them too. With torch
    older than 2.13 a sharded module cannot be reset, and gradients of a later pass could be lost.
    """
    if isinstance(module, FSDPModule):
        if not hasattr(module, "reset_iter_state"):
            return False
        module.reset_iter_state()
    return True
