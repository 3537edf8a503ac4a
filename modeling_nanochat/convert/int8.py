"""Weights of linear layers in int8, with one scale per output channel: a quarter of float32's memory, for a CPU.

Why not torchao's int8 weight-only: on a CPU without its compiler it writes the weights out in full for every product,
which takes six times as long as a product in float32. PyTorch's own kernel for few rows reads the int8 weights; only
with bfloat16 activations it is vectorized, so the rest of the model is in bfloat16.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

FEW_ROWS = 16
SMALLEST_SIDE = 32  # the gates stay as they are


class Int8Linear(nn.Module):
    """A linear layer without bias in bfloat16, (..., in_features) -> (..., out_features)."""

    scale: torch.Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if len(rows) <= FEW_ROWS:
            output = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:  # in float32, whose products are faster where a CPU has none in bfloat16
            output = torch.mm(rows.float(), self.weight.float().t()).mul_(self.scale).to(rows.dtype)
        return output.view(*hidden_states.shape[:-1], -1)


@torch.no_grad()
def quantize_int8(model: PreTrainedModel) -> None:
    """Replace the linear layers of a bfloat16 model on a CPU, head included, one after the other; embeddings stay."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer.bias is None and min(layer.weight.shape) >= SMALLEST_SIDE:
                setattr(parent, name, Int8Linear(layer))
