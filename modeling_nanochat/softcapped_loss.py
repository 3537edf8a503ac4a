"""Cross-entropy of a softcapped language-model head that never materialises the logits of a full batch.

The logits of a large vocabulary are the memory peak of training: 4 x 1,024 tokens of 32,768 logits are half a
gigabyte, several times over. Here rows go through the head in chunks, with the gradients computed in the same pass, so
no logit is stored or computed twice. Compiled in bfloat16, everything between a chunk's products is a single kernel.

One pass over a chunk suffices because the cap bounds its logits: their exponentials need no maximum subtracted first,
and the division by their sum moves from the chunk to the rows around it (before one product, after the other).

Existing implementations do not fit: torch's `linear_cross_entropy` and its chunked form have no softcap (2.13), TRL's
fused head belongs to its trainers, Liger's has the cap but needs Triton and reads each chunk twice.
"""

import torch
from torch.compiler import assume_constant_result

IGNORED = -100
SAFE_SOFTCAP = 60.0  # up to this bound the sum of a vocabulary's exponentials fits float32
CPU_CHUNK = 2**24  # fits the CPU's caches
ACCELERATOR_CHUNKS = (2**27, 2**29)  # minimum; and the largest that still helps: 8,192 rows of 65,536
MEMORY_PER_LOGIT = 128  # bytes of an accelerator per logit of a chunk, which itself takes 4 to 12


@assume_constant_result
def chunk_logits(device: torch.device) -> int:
    """Logits per chunk on `device`.

    A power of two by total memory: chunks sized by free memory would round differently in every run, and recompile.
    """
    if device.type == "cpu":
        return CPU_CHUNK
    known = device.type == "cuda" and torch.cuda.is_available()
    return affordable_chunk(torch.cuda.get_device_properties(device).total_memory if known else 0)


def affordable_chunk(memory: int) -> int:
    """Logits per chunk on an accelerator with `memory` bytes."""
    least, most = ACCELERATOR_CHUNKS
    return max(least, min(most, 2 ** (max(1, memory // MEMORY_PER_LOGIT).bit_length() - 1)))


def softcapped_cross_entropy(
    hidden_states: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignore_index: int = IGNORED,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `softcap * tanh(hidden_states @ head_weight.T / softcap)`, as a float32 scalar.

    Differentiable once, in `hidden_states` and `head_weight`. Under autocast the products run in its dtype.

    Args:
        hidden_states: (..., C).
        head_weight: (V, C).
        targets: (...) token ids.
        softcap: Bound of the logits, or None.
        ignore_index: Target that is excluded from the loss.
        chunk_rows: Rows per chunk; default: from the vocabulary's size and the device.

    Raises:
        ValueError: `targets` does not have one target per row.
        RuntimeError: In a backward pass with `create_graph=True`.
    """
    if hidden_states.shape[:-1] != targets.shape:
        raise ValueError(f"{tuple(targets.shape)} targets for {tuple(hidden_states.shape[:-1])} hidden states")
    rows, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    if chunk_rows is None:
        chunk_rows = max(1, chunk_logits(rows.device) // head_weight.shape[0])
    return SoftcappedCrossEntropy.apply(
        rows, head_weight, targets, softcap, ignore_index, chunk_rows, product_dtype(rows), torch.is_grad_enabled()
    )


def product_dtype(rows: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, otherwise the rows' own; never float16, in which the exponentials overflow."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    return torch.float32 if dtype == torch.float16 else dtype


class SoftcappedCrossEntropy(torch.autograd.Function):
    """Loss and unit gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, rows, weight, targets, softcap, ignore_index, chunk_rows, dtype, needs_gradient):
        row_gradients = torch.empty_like(rows) if needs_gradient and rows.requires_grad else None
        weight_gradient = None
        if needs_gradient and weight.requires_grad:
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(rows.device.type, enabled=False):  # `dtype` already includes its choice
            loss = loss_over_chunks(
                rows, weight.to(dtype), targets, softcap, ignore_index, chunk_rows, row_gradients, weight_gradient
            )
        ctx.save_for_backward(row_gradients, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # called with create_graph=True
            raise RuntimeError(
                "the chunked loss is differentiable once; pass skip_logits=False for second derivatives"
            )
        row_gradients, weight_gradient = ctx.saved_tensors
        if row_gradients is not None:
            row_gradients = row_gradients * gradient.to(row_gradients.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * gradient).to(ctx.weight_dtype)
        return row_gradients, weight_gradient, *[None] * 6


def loss_over_chunks(
    rows: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int,
    row_gradients: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The summed loss of rows (N, C); fills the gradient buffers of rows (N, C) and head (V, C) that are not None."""
    loss = torch.zeros((), dtype=torch.float32, device=rows.device)
    needs_gradient = row_gradients is not None or weight_gradient is not None
    for start in range(0, rows.shape[0], chunk_rows):
        chunk, target = rows[start : start + chunk_rows].to(head.dtype), targets[start : start + chunk_rows]
        chunk_loss, factors = loss_and_gradient(chunk, head, target, softcap, ignore_index, needs_gradient)
        loss = loss + chunk_loss
        if factors is None:
            continue
        gradient, per_row = factors
        if row_gradients is not None:
            row_gradients[start : start + chunk_rows] = (gradient @ head) * per_row
        if weight_gradient is not None:
            accumulate(weight_gradient, gradient, (chunk * per_row).to(head.dtype))
    return loss


def loss_and_gradient(
    chunk: torch.Tensor,
    head: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    needs_gradient: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The summed loss of a chunk (n, C) under the head (V, C), and its gradient by the uncapped logits as two factors.

    Returns:
        The loss, 0-d in float32; (n, V) in the head's dtype and (n, 1) in float32, to be multiplied, or None.
    """
    valid = (target != ignore_index).unsqueeze(1)
    target = torch.where(valid, target.unsqueeze(1), 0)
    exponentials, squares, target_logits, offset = exponentiate(chunk, head, target, softcap)
    total = exponentials.sum(-1, keepdim=True)
    loss = ((total.log() + offset - target_logits) * valid).sum()
    if not needs_gradient:
        return loss, None
    slope: torch.Tensor | float = 1.0
    if squares is not None:  # tanh' = 1 - tanh^2
        slope = 1 - squares.gather(1, target)
        exponentials.addcmul_(exponentials, squares, value=-1)
    return loss, (subtract_one_hot(exponentials, target, total * slope, head.dtype), valid / total)


def exponentiate(
    chunk: torch.Tensor, head: torch.Tensor, target: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | float]:
    """Exponentials (n, V), squares of tanh (n, V) or None, target logits (n, 1), maximum subtracted (n, 1) or 0."""
    if softcap is None:
        logits = (chunk @ head.t()).float()
        peak = logits.amax(-1, keepdim=True)
        return (logits - peak).exp_(), None, logits.gather(1, target), peak
    squashed = ((chunk / softcap) @ head.t()).float().tanh_()
    logits = softcap * squashed
    target_logits = logits.gather(1, target)
    offset: torch.Tensor | float = 0.0
    if softcap > SAFE_SOFTCAP:
        offset = logits.amax(-1, keepdim=True)
        logits -= offset
    return logits.exp_(), squashed.square_(), target_logits, offset


def subtract_one_hot(
    rows: torch.Tensor, target: torch.Tensor, amount: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`rows` (n, V) minus `amount` (n, 1) in each row's column `target` (n, 1), as `dtype`; may overwrite `rows`.

    A compiled scatter writes `rows` in float32 and reads it again for the cast; a comparison fuses into the kernel.
    """
    if torch.compiler.is_compiling() and dtype != rows.dtype:
        columns = torch.arange(rows.shape[1], device=rows.device)
        return (rows - torch.where(columns == target, amount, 0.0)).to(dtype)
    return rows.scatter_add_(1, target, -amount).to(dtype)


def accumulate(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """total += gradient.T @ rows, in float32."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), rows)
    else:
        total += gradient.t() @ rows
