"""Cross-entropy of a softcapped language-model head, without ever holding the logits of a whole batch.

The logits of a large vocabulary are the memory peak of training: 4 x 1,024 tokens of 32,768 logits are half a gigabyte,
several times over. Here rows go through the head in chunks, and the gradients are made in the same pass, so that no
logit is kept or computed twice.

One pass over a chunk suffices because the cap bounds its logits: their exponentials need no maximum subtracted first,
and the division by their sum moves from the chunk to the rows around it (before one product, after the other).

What else there is does not serve: torch's `linear_cross_entropy` and its chunked form have no softcap (2.13), TRL's
fused head belongs to its trainers, Liger's has the cap but needs Triton and reads each chunk twice.
"""

import torch

IGNORED = -100
# Logits per chunk: on a CPU what the caches hold, on an accelerator enough rows to keep it busy.
CPU_CHUNK = 2**24
ACCELERATOR_CHUNK = 2**27


def softcapped_cross_entropy(
    hidden_states: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `softcap * tanh(hidden_states @ head_weight.T / softcap)`, as a float32 scalar.

    Differentiable once, in `hidden_states` and `head_weight`. Under autocast the products run in its dtype.

    Args:
        hidden_states: (..., C).
        head_weight: (V, C).
        targets: (...) token ids; -100 is ignored.
        softcap: Bound of the logits, or None for none.
        chunk_rows: Rows per chunk; default: by the vocabulary's size and the device.
    """
    rows, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    if chunk_rows is None:
        budget = CPU_CHUNK if rows.device.type == "cpu" else ACCELERATOR_CHUNK
        chunk_rows = max(1, budget // head_weight.shape[0])
    return SoftcappedCrossEntropy.apply(
        rows, head_weight, targets, softcap, chunk_rows, product_dtype(rows), torch.is_grad_enabled()
    )


def product_dtype(rows: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, else the rows' own; never float16, whose range the exponentials leave."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    return torch.float32 if dtype == torch.float16 else dtype


class SoftcappedCrossEntropy(torch.autograd.Function):
    """Loss and unit gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, rows, weight, targets, softcap, chunk_rows, dtype, with_gradients):
        with torch.autocast(rows.device.type, enabled=False):  # `dtype` has its choice already
            return SoftcappedCrossEntropy.chunks(
                ctx, rows, weight, targets, softcap, chunk_rows, dtype, with_gradients
            )

    @staticmethod
    def chunks(ctx, rows, weight, targets, softcap, chunk_rows, dtype, with_gradients):
        head = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        if with_gradients:
            row_gradients = torch.empty_like(rows)
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, rows.shape[0], chunk_rows):
            chunk, target = rows[start : start + chunk_rows].to(dtype), targets[start : start + chunk_rows]
            valid = (target != IGNORED).unsqueeze(1)
            target = target.clamp(min=0).unsqueeze(1)
            exponentials, slopes, chosen, offset = exponentiate(chunk, head, target, softcap)
            total = exponentials.sum(-1, keepdim=True)
            loss = loss + ((total.log() + offset - chosen) * valid).sum()
            if with_gradients:
                per_row = valid / total
                slope = 1 if slopes is None else slopes.gather(1, target)
                pull = exponentials if slopes is None else exponentials.mul_(slopes)
                pull = pull.scatter_add_(1, target, -total * slope).to(dtype)
                row_gradients[start : start + chunk_rows] = (pull @ head) * per_row
                accumulate(weight_gradient, pull, (chunk * per_row).to(dtype))
        if with_gradients:
            ctx.save_for_backward(row_gradients, weight_gradient)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, gradient):
        row_gradients, weight_gradient = ctx.saved_tensors
        weight_gradient = (weight_gradient * gradient).to(ctx.weight_dtype)
        return row_gradients * gradient.to(row_gradients.dtype), weight_gradient, None, None, None, None, None


def exponentiate(
    chunk: torch.Tensor, head: torch.Tensor, target: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | float]:
    """Exponentials (n, V), the cap's slopes (n, V) or None, the targets' logits (n, 1), what was subtracted (n, 1)."""
    if softcap is None:
        logits = (chunk @ head.t()).float()
        peak = logits.amax(-1, keepdim=True)
        return (logits - peak).exp_(), None, logits.gather(1, target), peak
    squashed = ((chunk / softcap) @ head.t()).float().tanh_()
    chosen = softcap * squashed.gather(1, target)
    exponentials = (softcap * squashed).exp_()
    return exponentials, squashed.square_().neg_().add_(1), chosen, 0.0


def accumulate(total: torch.Tensor, pull: torch.Tensor, rows: torch.Tensor) -> None:
    """total += pull.T @ rows, in float32."""
    if pull.dtype == total.dtype:
        total.addmm_(pull.t(), rows)
    else:
        total += pull.t() @ rows
