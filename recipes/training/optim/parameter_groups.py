"""The parameter groups of [`~recipes.training.optim.optimizer.MuonAdamW`]: which update rule, at which rates."""

from collections import defaultdict

import torch
from transformers import PreTrainedModel

from modeling_nanochat.errors import UserError

Rules = dict[str, dict]


def parameter_groups(
    model: PreTrainedModel,
    *,
    recipe: str = "current",
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Groups of named parameters: every matrix inside the layers uses Muon, everything else AdamW.

    AdamW's rates for embeddings and head hold at width 768 and scale with 1/sqrt(width); Muon's rate needs no scaling.
    `scalar_lr` is for turbo's scales on embedding and residual stream. `weight_decay` applies to Muon in the recipe
    "current", and to AdamW in "classic", whose Muon has none. Frozen parameters are skipped.

    Raises:
        UserError: The recipe is unknown, or has no rule for a parameter of this model.
    """
    scale = (model.config.hidden_size / 768) ** -0.5
    tables = {"unembedding_lr": unembedding_lr * scale, "embedding_lr": embedding_lr * scale}
    if recipe == "current":
        rules = current_rules(matrix_lr, **tables, scalar_lr=scalar_lr, weight_decay=weight_decay)
    elif recipe == "classic":
        rules = classic_rules(matrix_lr, **tables, weight_decay=weight_decay)
    else:
        raise UserError(f"recipe {recipe}: there are only current and classic")
    members = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            role = role_of(name, p)
            if role not in rules:
                raise UserError(f"recipe {recipe} does not know {name}: it trains plain models; set recipe: current")
            members[role].append((name, p))
    return [{"kind": "adamw", "params": members[role]} | rule for role, rule in rules.items() if members[role]]


def current_rules(
    matrix_lr: float, unembedding_lr: float, embedding_lr: float, scalar_lr: float, weight_decay: float
) -> Rules:
    return {
        "head": {"lr": unembedding_lr, "betas": (0.8, 0.96), "weight_decay": 0.01},
        "embedding": {"lr": embedding_lr, "betas": (0.8, 0.995), "weight_decay": 0.001},
        "value_embeddings": {"lr": 0.5 * embedding_lr, "betas": (0.8, 0.995), "weight_decay": 0.01},
        "residual_scales": {"lr": 0.01 * scalar_lr, "weight_decay": 0.05},
        "embedding_scales": {"lr": scalar_lr, "betas": (0.96, 0.95)},
        "smear_and_backout": {"lr": 0.2},
        "vectors": {"lr": embedding_lr},
        "matrices": {"kind": "muon", "lr": matrix_lr, "weight_decay": weight_decay},
    }


def classic_rules(matrix_lr: float, unembedding_lr: float, embedding_lr: float, weight_decay: float) -> Rules:
    """The launch version's rules; AdamW's other settings are the defaults of both recipes."""
    return {
        "head": {"lr": unembedding_lr, "weight_decay": weight_decay},
        "embedding": {"lr": embedding_lr, "weight_decay": weight_decay},
        "matrices": {"kind": "muon", "lr": matrix_lr, "orthogonalization": "newton_schulz"},
    }


def role_of(name: str, parameter: torch.Tensor) -> str:
    """The name of the rule that updates a parameter."""
    patterns = {
        "lm_head": "head",
        "embed_tokens": "embedding",
        "value_embeds": "value_embeddings",
        "resid_lambdas": "residual_scales",
        "x0_lambdas": "embedding_scales",
        "smear_": "smear_and_backout",
        "backout_lambda": "smear_and_backout",
    }
    return next(
        (role for pattern, role in patterns.items() if pattern in name),
        "matrices" if parameter.ndim == 2 else "vectors",
    )
