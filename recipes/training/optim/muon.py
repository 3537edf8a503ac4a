"""The arithmetic of Muon, as functions on stacks of equally shaped matrices: (K, rows, columns).

Two recipes. The launch version (`newton_schulz`): Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/),
momentum and five Newton-Schulz iterations. Today's (`polar_express`): row equilibration (MuonEq, arXiv 2603.28254),
Polar Express (arXiv 2505.16932), renormalisation (Muon+, arXiv 2602.21545), then per-neuron variance (NorMuon,
arXiv 2510.05491) and cautious weight decay (arXiv 2411.16085).

Rates are floats, or 0-d tensors, so that a compiled function does not recompile for every value.
"""

import torch

Number = float | torch.Tensor

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
# For singular values up to 1/1.01, five iterations, safety 2e-2, cushion 2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are faster than float32's, else float32: many CPUs only emulate bfloat16."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "xpu" else torch.float32


def nesterov(update: torch.Tensor, grad: torch.Tensor, momentum_buffer: torch.Tensor, momentum: Number) -> None:
    """Write the Nesterov momentum update into `update`; updates `momentum_buffer` in place."""
    grad = grad.float()
    momentum_buffer.lerp_(grad, 1 - momentum)
    update.copy_(grad).lerp_(momentum_buffer, momentum)


def directions(
    updates: torch.Tensor,
    second_moments: torch.Tensor | None,
    beta2: Number,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Directions of the matrices (K, rows, columns), in float32; updates `second_moments` in place (see below).

    Without `second_moments`, the launch version's directions.
    """
    if second_moments is None:
        return newton_schulz(updates, dtype)
    return normalize_variance(polar_express(updates, dtype), second_moments, beta2)


def newton_schulz(updates: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices to `updates`, in float32: singular values of 0.7 to 1.2."""
    x = updates.to(dtype)
    return iterated(x / (frobenius(x) + 1e-7).to(dtype), NEWTON_SCHULZ).float()


def polar_express(updates: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to `updates` with equalised row norms; norm sqrt(min(sides))."""
    rows, columns = updates.shape[-2:]
    x = updates.to(dtype)
    row_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    norm = torch.linalg.vector_norm(row_norm, dim=-2, keepdim=True)
    x = x * (norm / rows**0.5 / row_norm.clamp(min=1e-6)).to(dtype)
    x = x / (1.01 * frobenius(x) + 1e-6).to(dtype)
    x = iterated(x, POLAR_EXPRESS).float()
    return x * (min(rows, columns) ** 0.5 / frobenius(x).clamp(min=1e-6))


def iterated(x: torch.Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """x <- a x + (b A + c A^2) x for each (a, b, c), A = x x^T; multiplied from the other side if that is smaller."""
    wide = x.shape[-2] <= x.shape[-1]
    for a, b, c in coefficients:
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a) if wide else torch.baddbmm(x, x, polynomial, beta=a)
    return x


def frobenius(x: torch.Tensor) -> torch.Tensor:
    """Norm of each matrix, (K, 1, 1), in float32."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def second_moment_shape(shape: torch.Size) -> torch.Size:
    """One value per neuron: per row of tall and square matrices, per column of wide ones."""
    rows, columns = shape
    return torch.Size((rows, 1) if rows >= columns else (1, columns))


def normalize_variance(updates: torch.Tensor, second_moments: torch.Tensor, beta2: Number) -> torch.Tensor:
    """Divide each neuron by its running root mean square, keeping each matrix's norm.

    Updates `second_moments` (K, rows, 1) or (K, 1, columns) in place.
    """
    axis = -1 if second_moments.shape[-1] == 1 else -2
    size = updates.shape[axis]
    mean_square = torch.linalg.vector_norm(updates, dim=axis, keepdim=True).square() / size
    second_moments.lerp_(mean_square, 1 - beta2)
    scale = second_moments.clamp(min=1e-10).rsqrt()
    norm = (size * mean_square.sum(dim=(-2, -1), keepdim=True)).sqrt()
    new_norm = (size * (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)).sqrt()
    return updates * (scale * (norm / new_norm.clamp(min=1e-10)))


def descend(weight: torch.Tensor, update: torch.Tensor, lr: Number, weight_decay: Number | None) -> None:
    """Step `weight` along `update`; weight decay applies only where the step shrinks the weight (cautious)."""
    exact = weight.float()
    if weight_decay is not None:
        shrinking = (update * exact >= 0) * exact
        update = update + shrinking * weight_decay
    weight.copy_(exact.sub_(update * lr))  # float32 weights are `exact` itself: nothing is copied
