"""Weights of linear layers in int8, with one scale per output channel: a quarter of the memory, for a CPU.

Why not torchao's int8 weight-only: on a CPU without its compiler it writes the weights out in float32 for every
product, which is slower than without quantization. PyTorch's own kernel for few rows reads the int8 weights.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

FEW_ROWS = 16
SMALLEST_SIDE = 32  # the gates stay as they are


class Int8Linear(nn.Module):
    """A linear layer without bias, (..., in_features) -> (..., out_features)."""

    scale: torch.Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        self.weight = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if len(rows) <= FEW_ROWS:
            output = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            output = torch.mm(rows, self.weight.to(rows.dtype).t()) * self.scale
        return output.view(*hidden_states.shape[:-1], -1)


@torch.no_grad()
def quantize_int8(model: PreTrainedModel) -> None:
    """Replace the linear layers of a float32 model on a CPU, head included, one after the other; embeddings stay."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer.bias is None and min(layer.weight.shape) >= SMALLEST_SIDE:
                setattr(parent, name, Int8Linear(layer))
