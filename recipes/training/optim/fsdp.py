"""FSDP2: one model sharded over all processes, for sizes whose weights, gradients and state do not fit on each."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from modeling_nanochat.errors import UserError


def shard_model(model: PreTrainedModel, accelerator: Accelerator) -> FSDPModule:
    """Shard `model` in place, as the launch file's `fsdp_config` says: each decoder layer is a unit, all else is one more.

    `accelerator.prepare` would average gradients in bfloat16 and round the loss to it. It would also make the head a unit
    of its own, whose weight is whole only while the head itself is called; the chunked loss takes the weight instead.

    Raises:
        UserError: `fsdp_cpu_ram_efficient_loading` is set.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise UserError("fsdp_cpu_ram_efficient_loading: here every process builds the whole model; set it to false")
    if plugin.activation_checkpointing:
        recompute_layers(model)
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": mixed_precision_policy(accelerator.mixed_precision),
        "offload_policy": plugin.cpu_offload,
    }
    for layer in model.base_model.layers:
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    # Resharded in any case: an evaluation would else leave the head whole, outside of any pass.
    return fully_shard(model, reshard_after_forward=True, **options)


def mixed_precision_policy(precision: str) -> MixedPrecisionPolicy:
    """bfloat16 weights travel and compute, gradients are summed in float32, and outputs such as the loss stay as they are."""
    if precision == "no":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass; transformers 5.24 renamed how."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # under either name the first argument


def forget_failed_pass(module: nn.Module) -> bool:
    """Make `module` ready for another pass after one that an exception has ended; False where that is not possible.

    Of sharded modules the next pass's gradients may still hold some of the failed one's: drop them too. They cannot be made
    ready with torch older than 2.13, where gradients of a later pass could go missing.
    """
    if isinstance(module, FSDPModule):
        if not hasattr(module, "reset_iter_state"):
            return False
        module.reset_iter_state()
    return True
