"""Muon for the matrices, AdamW for everything else, in one `torch.optim.Optimizer`.

One class and one code path, so that state, learning rates and checkpoints live where Accelerate and TRL look for them.
The Muon step is today's nanochat's: momentum, row equilibration (MuonEq, arXiv 2603.28254), orthogonalisation by Polar
Express (arXiv 2505.16932), renormalisation (Muon+, arXiv 2602.21545), per-neuron variance (NorMuon, arXiv 2510.05491)
and cautious weight decay (arXiv 2411.16085). Matrices of one shape are stacked and updated in one batched call.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

# Coefficients of the five iterations: for singular values up to 1/1.01, safety 2e-2, cushion 2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ADAMW_DEFAULTS = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
MUON_DEFAULTS = {"momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0}


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with `kind` "muon" (2-D matrices) or "adamw", each updated by its rule.

    Besides `lr`, a muon group has `momentum`, `beta2` and `weight_decay`, an adamw group `betas`, `eps` and
    `weight_decay`; schedules change them from outside. State per parameter: muon `momentum_buffer` (like the parameter)
    and `second_moment` (one value per row or column); adamw `step`, `exp_avg` and `exp_avg_sq`.

    Raises:
        ValueError: A muon group holds something that is not a matrix, or `kind` is unknown.
    """

    def __init__(self, groups: Iterable[dict]):
        groups = [self.with_defaults(dict(group)) for group in groups]
        super().__init__(groups, {})

    @staticmethod
    def with_defaults(group: dict) -> dict:
        if group["kind"] not in ("muon", "adamw"):
            raise ValueError(f"unknown kind of parameter group: {group['kind']!r}")
        group["params"] = list(group["params"])
        if group["kind"] == "muon" and any(p.ndim != 2 for p in group["params"]):
            raise ValueError("Muon updates matrices only; put other parameters into an adamw group")
        return (MUON_DEFAULTS if group["kind"] == "muon" else ADAMW_DEFAULTS) | group

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self.step_muon(group)
            else:
                self.step_adamw(group)
        return loss

    def step_adamw(self, group: dict) -> None:
        """Decoupled weight decay, bias-corrected moments; arithmetic in float32 whatever the parameter's dtype."""
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state, grad = self.state[p], p.grad.float()
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            state["step"] += 1
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
            corrected = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
            update = state["exp_avg"] / (corrected.sqrt_() + group["eps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.to(p.dtype), alpha=-group["lr"] / (1 - beta1 ** state["step"]))

    def step_muon(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for shape, params in by_shape.items():
            self.step_stack(params, shape, group)

    def step_stack(self, params: list[torch.Tensor], shape: torch.Size, group: dict) -> None:
        """One batched update of the equally shaped matrices `params`."""
        rows, columns = shape
        axis = -1 if rows >= columns else -2
        for p in params:
            if not self.state[p]:
                factored = (rows, 1) if axis == -1 else (1, columns)
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
                self.state[p]["second_moment"] = torch.zeros(factored, dtype=torch.float32, device=p.device)
        momentum = torch.stack([self.state[p]["momentum_buffer"] for p in params])
        second_moment = torch.stack([self.state[p]["second_moment"] for p in params])
        grad, weight = torch.stack([p.grad for p in params]).float(), torch.stack(list(params)).float()

        momentum.lerp_(grad, 1 - group["momentum"])
        update = orthogonalize(grad.lerp_(momentum, group["momentum"]))
        update = normalize_variance(update, second_moment, axis, group["beta2"])

        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        decay = weight * (update * weight >= 0)  # cautious: only where the update shrinks the weight anyway
        weight.sub_(update, alpha=lr).sub_(decay, alpha=lr * group["weight_decay"])
        for i, p in enumerate(params):
            p.copy_(weight[i])
            self.state[p]["momentum_buffer"].copy_(momentum[i])
            self.state[p]["second_moment"].copy_(second_moment[i])


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to `update` (K, rows, columns), scaled to Frobenius norm sqrt(min(rows, columns)).

    In bfloat16 on CUDA, where its matmuls are fast; in float32 elsewhere (many CPUs only emulate bfloat16).
    """
    rows, columns = update.shape[-2:]
    x = update.bfloat16() if update.is_cuda else update
    row_norm = x.float().norm(dim=-1, keepdim=True)
    norm = row_norm.norm(dim=-2, keepdim=True)
    x = x * (norm / rows**0.5 / row_norm.clamp(min=1e-6)).to(x.dtype)
    x = x / (1.01 * x.float().norm(dim=(-2, -1), keepdim=True) + 1e-6).to(x.dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT if rows <= columns else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = a * x + (polynomial @ x if rows <= columns else x @ polynomial)
    x = x.float()
    return x * (min(rows, columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))


def normalize_variance(update: torch.Tensor, second_moment: torch.Tensor, axis: int, beta2: float) -> torch.Tensor:
    """Divide each neuron by its running root mean square, keeping the Frobenius norm; updates `second_moment` in place."""
    size = update.shape[axis]
    mean_square = update.square().mean(dim=axis, keepdim=True)
    norm = (size * mean_square.sum(dim=(-2, -1), keepdim=True)).sqrt()
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp(min=1e-10).rsqrt()
    new_norm = (size * (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)).sqrt()
    return update * scale * (norm / new_norm.clamp(min=1e-10))


def parameter_groups(
    model: nn.Module,
    *,
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Groups for [`MuonAdamW`]: every matrix inside the layers to Muon, all else to AdamW.

    AdamW's rates of tables and head are given for a width of 768 and scale with 1/sqrt(width); Muon's needs no scaling.
    `scalar_lr` is for turbo's scales on embedding and residual stream. `weight_decay` is Muon's. Frozen parameters are
    left out.
    """
    scale = (model.config.hidden_size / 768) ** -0.5
    rules = {
        "head": {"lr": unembedding_lr * scale, "betas": (0.8, 0.96), "weight_decay": 0.01},
        "embedding": {"lr": embedding_lr * scale, "betas": (0.8, 0.995), "weight_decay": 0.001},
        "value_embeddings": {"lr": 0.5 * embedding_lr * scale, "betas": (0.8, 0.995), "weight_decay": 0.01},
        "residual_scales": {"lr": 0.01 * scalar_lr, "weight_decay": 0.05},
        "embedding_scales": {"lr": scalar_lr, "betas": (0.96, 0.95)},
        "smear_and_backout": {"lr": 0.2},
        "vectors": {"lr": embedding_lr * scale},
        "matrices": {"kind": "muon", "lr": matrix_lr, "weight_decay": weight_decay},
    }
    members = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            members[role_of(name, p)].append(p)
    return [{"kind": "adamw", "params": members[role]} | rule for role, rule in rules.items() if members[role]]


def role_of(name: str, parameter: torch.Tensor) -> str:
    """Which rule of [`parameter_groups`] a parameter of the models follows."""
    parts = {
        "lm_head": "head",
        "embed_tokens": "embedding",
        "value_embeds": "value_embeddings",
        "resid_lambdas": "residual_scales",
        "x0_lambdas": "embedding_scales",
        "smear_": "smear_and_backout",
        "backout_lambda": "smear_and_backout",
    }
    return next((role for part, role in parts.items() if part in name), "matrices" if parameter.ndim == 2 else "vectors")


def muon_adamw(model: nn.Module, **rates: float) -> MuonAdamW:
    """[`MuonAdamW`] over [`parameter_groups`]; the factory that TRL's trainers call."""
    return MuonAdamW(parameter_groups(model, **rates))
