"""The attention implementation that a stage trains with: the key `attn_implementation` of all four stages.

`sdpa` is torch's and runs everywhere, but uses dense masks for windows and packed documents. `flex_attention` skips
masked blocks, and uses sdpa for layers with full causal attention. The others are packages or kernels to install.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line

from .device import compiler_available

IMPLEMENTATIONS = ("sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager")
HUB_KERNELS = "kernels-community/"  # the only kernels that transformers downloads without `allow_all_kernels`
# Where FlexAttention was measured: H100 and H200. Forward and backward pass at 2,048 tokens, head_dim 128, window 512:
# 2.4 ms; with a dense mask 8.2 ms; full causal attention 2.8 ms.
MEASURED_CAPABILITY = 9


@dataclass(kw_only=True)
class AttentionArguments:
    """The same option in every training stage."""

    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention in training: sdpa, flex_attention, flash_attention_2, _3 or _4, eager, or a kernel of "
            f"{HUB_KERNELS.strip('/')}; default: flex_attention for compiled training on H100 and H200, else sdpa."
        },
    )


def check_attention(name: str | None) -> None:
    """Raise [`UserError`] unless `name` is empty or a name that transformers knows."""
    if name and name not in IMPLEMENTATIONS and not name.startswith(HUB_KERNELS):
        known = f"{', '.join(IMPLEMENTATIONS)} and {HUB_KERNELS}..."
        raise UserError(f"attn_implementation {name}: there are only {known}")


def set_attention(model: PreTrainedModel, name: str | None, device: torch.device, bfloat16: bool) -> None:
    """Set the attention implementation of `model` to `name`; an empty name changes nothing.

    Args:
        device: The device to train on.
        bfloat16: Whether to train in bfloat16.

    Raises:
        UserError: There is no such implementation, or it does not train here.
    """
    check_attention(name)
    if not name:
        return
    if name not in ("sdpa", "eager") and device.type in ("cpu", "mps"):
        raise UserError(f"attn_implementation {name} does not train on {device.type}: take sdpa, or leave it out")
    if "flash" in name and not bfloat16:
        raise UserError(
            f"attn_implementation {name} computes in bfloat16 only: train in bf16, take sdpa, or leave it out"
        )
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # missing package, failed download, unsuitable kernel: many types
        raise UserError(f"attn_implementation {name} cannot be used here: {first_line(error)}") from error


def choose_attention(
    model: PreTrainedModel, name: str | None, compiled: bool | None, accelerator: Accelerator
) -> None:
    """[`set_attention`] for a stage that compiles its model; by default FlexAttention on GPUs where it was measured.

    Args:
        compiled: Whether to compile the model; None: if that works. Uncompiled, FlexAttention stores all scores.
    """
    bfloat16 = accelerator.mixed_precision in ("bf16", "fp8")
    default = model.config._attn_implementation == "sdpa"  # else the model's folder has chosen
    if not name and default and compiled is not False and bfloat16 and is_measured(accelerator.device):
        name = "flex_attention" if compiler_available(accelerator.device.type)[0] else None
    set_attention(model, name, accelerator.device, bfloat16)


def is_measured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == MEASURED_CAPABILITY


@contextmanager
def evaluation_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use sdpa instead of FlexAttention within the block: evaluations call the uncompiled model, with many lengths."""
    before = model.config._attn_implementation
    if before == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
