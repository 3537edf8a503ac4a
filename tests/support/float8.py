"""Stand-in for torchao's float8 layers: float32 values rounded to float8.

Follows torchao's defaults: inputs and weights in e4m3, output gradients in e5m2, with dynamic per-tensor scaling of
the maximum to the format's maximum. The products of the rounded values are computed in float32, as in torchao's
emulation.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

INPUTS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_AMAX = 1e-12  # torchao's lower bound, for tensors of zeros


def rounded(tensor: torch.Tensor, dtype: torch.dtype, error: float = 1.0) -> torch.Tensor:
    """`tensor` rounded to float8 `dtype`, in float32; `error` is the factor by which the scale is too large."""
    largest = torch.finfo(dtype).max
    scale = (error * largest / tensor.abs().amax().double().clamp(min=SMALLEST_AMAX)).float()
    return (tensor.float() * scale).clamp(-largest, largest).to(dtype).float() / scale


class Float8Product(torch.autograd.Function):
    """inputs (..., in) @ weight (out, in).T, with the operands rounded in forward and backward."""

    @staticmethod
    def forward(ctx, inputs, weight, dtype, error):
        inputs, weight = rounded(inputs.to(dtype), INPUTS, error), rounded(weight.to(dtype), INPUTS, error)
        ctx.save_for_backward(inputs, weight)
        ctx.error = error
        with torch.autocast(inputs.device.type, enabled=False):
            return (inputs @ weight.t()).to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        gradient = rounded(gradient, GRADIENTS, ctx.error)
        return gradient @ weight, gradient.flatten(0, -2).t() @ inputs.flatten(0, -2), None, None


class Float8Linear(nn.Linear):
    scale_error = 1.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        return Float8Product.apply(inputs, self.weight, dtype, self.scale_error)


@dataclass
class Float8LinearConfig:
    pad_inner_dim: bool = False
    enable_fsdp_float8_all_gather: bool = False
    emulate: bool = False


def convert_to_float8_training(module: nn.Module, *, module_filter_fn, config: Float8LinearConfig) -> nn.Module:
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and module_filter_fn(layer, name):
            with torch.device("meta"):
                new = Float8Linear(layer.in_features, layer.out_features, bias=False)
            new.weight = layer.weight
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, new)
    return module


def stand_in() -> ModuleType:
    """The parts of `torchao.float8` that are used."""
    module = ModuleType("torchao.float8")
    for part in (Float8Linear, Float8LinearConfig, convert_to_float8_training):
        setattr(module, part.__name__, part)
    return module
