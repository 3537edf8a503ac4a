"""Cross-entropy of a softcapped language-model head, without ever holding the logits of a whole batch.

The logits of a large vocabulary are the memory peak of training: 4 x 1,024 tokens of 32,768 logits are half a gigabyte,
several times over. Here rows go through the head in chunks, and the gradients are made in the same pass, so that no
logit is kept or computed twice. Compiled in bfloat16, what happens between a chunk's products is a single kernel.

One pass over a chunk suffices because the cap bounds its logits: their exponentials need no maximum subtracted first,
and the division by their sum moves from the chunk to the rows around it (before one product, after the other).

What else there is does not serve: torch's `linear_cross_entropy` and its chunked form have no softcap (2.13), TRL's
fused head belongs to its trainers, Liger's has the cap but needs Triton and reads each chunk twice.
"""

import torch
from torch.compiler import assume_constant_result

IGNORED = -100
SAFE_SOFTCAP = 60.0  # the exponentials of a vocabulary within this bound still add up in float32
CPU_CHUNK = 2**24  # what the caches hold
ACCELERATOR_CHUNKS = (2**27, 2**29)  # the least for little memory, the most that is of use: 8,192 rows of 65,536
MEMORY_PER_LOGIT = 128  # bytes of an accelerator for each logit of a chunk, which takes 4 to 12 of them


@assume_constant_result
def chunk_logits(device: torch.device) -> int:
    """Logits of one chunk on `device`.

    By the whole memory, a power of two: chunks by what is free would round differently in every run, and compile anew.
    """
    if device.type == "cpu":
        return CPU_CHUNK
    known = device.type == "cuda" and torch.cuda.is_available()
    return affordable_chunk(torch.cuda.get_device_properties(device).total_memory if known else 0)


def affordable_chunk(memory: int) -> int:
    """Logits of one chunk on an accelerator with `memory` bytes."""
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
        softcap: Bound of the logits, or None for none.
        ignore_index: The target that counts for nothing.
        chunk_rows: Rows per chunk; default: by the vocabulary's size and the device.

    Raises:
        ValueError: There is not one target for each row.
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
    """Autocast's dtype, else the rows' own; never float16, whose range the exponentials leave."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    return torch.float32 if dtype == torch.float16 else dtype


class SoftcappedCrossEntropy(torch.autograd.Function):
    """Loss and unit gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, rows, weight, targets, softcap, ignore_index, chunk_rows, dtype, learning):
        row_gradients = torch.empty_like(rows) if learning and rows.requires_grad else None
        weight_gradient = None
        if learning and weight.requires_grad:
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(rows.device.type, enabled=False):  # `dtype` has its choice already
            loss = over_chunks(
                rows, weight.to(dtype), targets, softcap, ignore_index, chunk_rows, row_gradients, weight_gradient
            )
        ctx.save_for_backward(row_gradients, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # create_graph: second derivatives are wanted
            raise RuntimeError(
                "the chunked loss is differentiable once; pass skip_logits=False for second derivatives"
            )
        row_gradients, weight_gradient = ctx.saved_tensors
        if row_gradients is not None:
            row_gradients = row_gradients * gradient.to(row_gradients.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * gradient).to(ctx.weight_dtype)
        return row_gradients, weight_gradient, *[None] * 6


def over_chunks(
    rows: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    chunk_rows: int,
    row_gradients: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The summed loss of rows (N, C); fills in the gradients of rows (N, C) and head (V, C) that are not None."""
    loss = torch.zeros((), dtype=torch.float32, device=rows.device)
    learning = row_gradients is not None or weight_gradient is not None
    for start in range(0, rows.shape[0], chunk_rows):
        chunk, target = rows[start : start + chunk_rows].to(head.dtype), targets[start : start + chunk_rows]
        summed, pull, per_row = loss_and_pull(chunk, head, target, softcap, ignore_index, learning)
        loss = loss + summed
        if row_gradients is not None:
            row_gradients[start : start + chunk_rows] = (pull @ head) * per_row
        if weight_gradient is not None:
            accumulate(weight_gradient, pull, (chunk * per_row).to(head.dtype))
    return loss


def loss_and_pull(
    chunk: torch.Tensor,
    head: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None,
    ignore_index: int,
    learning: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss of a chunk (n, C) under the head (V, C), and its gradient before the cap as two factors.

    Returns:
        The loss, 0-d in float32; (n, V) in the head's dtype and (n, 1) in float32, to be multiplied, or None, None.
    """
    valid = (target != ignore_index).unsqueeze(1)
    target = torch.where(valid, target.unsqueeze(1), 0)
    exponentials, squares, chosen, offset = exponentiate(chunk, head, target, softcap)
    total = exponentials.sum(-1, keepdim=True)
    loss = ((total.log() + offset - chosen) * valid).sum()
    if not learning:
        return loss, None, None
    slope = 1.0
    if squares is not None:  # tanh' = 1 - tanh^2
        slope = 1 - squares.gather(1, target)
        exponentials.addcmul_(exponentials, squares, value=-1)
    return loss, subtract_one_hot(exponentials, target, total * slope, head.dtype), valid / total


def exponentiate(
    chunk: torch.Tensor, head: torch.Tensor, target: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | float]:
    """Exponentials (n, V), squares of tanh (n, V) or None, the targets' logits (n, 1), what was subtracted (n, 1)."""
    if softcap is None:
        logits = (chunk @ head.t()).float()
        peak = logits.amax(-1, keepdim=True)
        return (logits - peak).exp_(), None, logits.gather(1, target), peak
    squashed = ((chunk / softcap) @ head.t()).float().tanh_()
    logits = softcap * squashed
    chosen = logits.gather(1, target)
    peak = 0.0
    if softcap > SAFE_SOFTCAP:
        peak = logits.amax(-1, keepdim=True)
        logits -= peak
    return logits.exp_(), squashed.square_(), chosen, peak


def subtract_one_hot(
    rows: torch.Tensor, target: torch.Tensor, amount: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`rows` (n, V), changed in place, less `amount` (n, 1) in each row's column `target` (n, 1), as `dtype`.

    A compiled scatter needs `rows` written out in float32 and read again for the cast; a comparison is part of the kernel.
    """
    if torch.compiler.is_compiling() and dtype != rows.dtype:
        columns = torch.arange(rows.shape[1], device=rows.device)
        return (rows - torch.where(columns == target, amount, 0.0)).to(dtype)
    return rows.scatter_add_(1, target, -amount).to(dtype)


def accumulate(total: torch.Tensor, pull: torch.Tensor, rows: torch.Tensor) -> None:
    """total += pull.T @ rows, in float32."""
    if pull.dtype == total.dtype:
        total.addmm_(pull.t(), rows)
    else:
        total += pull.t() @ rows
