"""The dial: batch size, steps, learning rates and weight decay of pretraining, derived from a configuration's sizes.

Two recipes. *classic* is the launch's: 20 tokens per parameter, 524,288 tokens per step, constants for the rest.
*current* is today's: 12 tokens per parameter in matrices and head, and constants tuned at depth 12 that are
transferred to other sizes by the number of training tokens D:
- batch size ∝ D^0.383, rounded to a power of two (arXiv 2505.13738)
- learning rates ∝ sqrt(batch size), as for Adam
- weight decay such that learning rate x weight decay x D / batch size, the number of times a run forgets its weights,
  stays constant (arXiv 2405.13698)

Values that are given are not changed. AdamW's rates hold at width 768; the optimizer's parameter groups scale them.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.configuration_nanochat import ASPECT_RATIO
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import parameter_counts, scaling_parameters, training_flops_per_token

from .overrides import SHAPE, Overrides, whole_rows
from .schedule import Schedule, Shape

REFERENCE_DEPTH = 12
REFERENCE_BATCH_SIZE = 2**19
BATCH_SIZE_EXPONENT = 0.383
FEWEST_STEPS = 100  # the original's smallest model trains 528
STEPS_PER_WARMUP_STEP = 10
# Origins of values that were not derived
GIVEN, INHERITED, RECIPE_DEFAULT, STAGE_DEFAULT = NOT_DERIVED = (
    "given",
    "inherited",
    "recipe default",
    "stage default",
)


@dataclass(frozen=True)
class Recipe(Shape):
    """Constants of a recipe; the defaults are those of "current". If `scales`, they hold at depth 12."""

    scales: bool = True
    counted: str = "matrices and head"
    target_param_data_ratio: float = 12.0
    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    weight_decay: float = 0.28
    max_grad_norm: float | None = None

    def parameters(self, config: NanoChatConfig) -> int:
        """The parameters that tokens per parameter refers to."""
        return scaling_parameters(config) if self.scales else parameter_counts(config)["total"]


RECIPES = {
    "classic": Recipe(
        scales=False,
        counted="the whole model",
        target_param_data_ratio=20.0,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        weight_decay=0.0,
        max_grad_norm=1.0,
        warmup_steps=0,
        warmdown_ratio=0.2,
        final_lr_fraction=0.0,
        momentum_steps=300,
        peak_momentum=0.95,
        final_momentum=0.95,
        final_weight_decay_fraction=1.0,
    ),
    "current": Recipe(),
}


@dataclass(frozen=True)
class Plan:
    """The resolved hyperparameters of a pretraining run.

    `origins` tells where each value comes from: one of NOT_DERIVED, or how it was derived. `flops` are the model's
    over the run, forward and backward. The derived rates already include `learning_rate_factor`.
    """

    recipe: str
    max_steps: int
    total_batch_size: int  # tokens
    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    weight_decay: float
    warmup_steps: int
    warmdown_ratio: float
    final_lr_fraction: float
    momentum_steps: int
    peak_momentum: float
    final_momentum: float
    max_grad_norm: float | None
    learning_rate_factor: float
    tokens: int
    tokens_per_parameter: float
    flops: int
    origins: Mapping[str, str] = field(repr=False)

    def schedule(self) -> Schedule:
        shape = {name: getattr(self, name) for name in SHAPE}
        decay = RECIPES[self.recipe].final_weight_decay_fraction
        return Schedule(self.max_steps, **shape, final_weight_decay_fraction=decay)

    def lines(self) -> list[str]:
        """The plan as printed lines: its size, each derived value with its origin, then the other values."""
        counted = RECIPES[self.recipe].counted
        amount = (
            f"recipe {self.recipe}: {self.max_steps:,} steps of {self.total_batch_size:,} tokens = {self.tokens:,} "
            f"tokens, {self.tokens_per_parameter:.3g} per parameter of {counted}; {self.flops:.3g} FLOPs"
        )
        named = {name: f"{name} {format_number(getattr(self, name))}" for name in self.origins}
        derived = [f"  derived: {named[name]} = {why}" for name, why in self.origins.items() if why not in NOT_DERIVED]
        others = [(kind, [named[name] for name, why in self.origins.items() if why == kind]) for kind in NOT_DERIVED]
        return [amount] + derived + [f"  {kind}: {', '.join(names)}" for kind, names in others if names]


def format_number(value: float | None) -> str:
    """A readable number: 524,288 or 0.0283; `none` for None."""
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def resolve_hyperparameters(
    config: NanoChatConfig,
    recipe: str,
    overrides: Overrides | None = None,
    *,
    max_length: int,
    aspect_ratio: int | None = None,
    stage_defaults: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a run, from a plain or turbo configuration of any size.

    The number of steps comes from `max_steps`, else from `target_flops`, else from `target_param_data_ratio`. Batch
    size and weight decay always follow from the ratio's number of tokens, as in the original.

    Args:
        config: The model's sizes; its vocabulary counts.
        recipe: "classic" or "current".
        overrides: Values to use instead of derived ones.
        max_length: Tokens per row; a step is a whole number of rows.
        aspect_ratio: The argument of `config.from_depth`, for the reference at depth 12; by default the usual ratio if
            it gives this width, else the width per layer.
        stage_defaults: Constants of the stage, by their names in [`Recipe`], which replace the recipe's.

    Raises:
        UserError: The recipe is unknown, a value is out of range, or the run has less than one step.
    """
    stage_defaults, given = stage_defaults or {}, overrides or Overrides()
    constants = replace(get_recipe(recipe), **stage_defaults)
    given.check(max_length)
    counted = constants.parameters(config)
    growth = counted / constants.parameters(reference(config, aspect_ratio)) if constants.scales else 1.0
    ratio = given.target_param_data_ratio or constants.target_param_data_ratio
    origins, tokens = {}, int(ratio * counted)
    batch, origins["total_batch_size"] = batch_size(constants, given.total_batch_size, tokens, growth, max_length)
    flops_per_step = training_flops_per_token(config, max_length) * batch
    why_tokens = f"target_param_data_ratio {ratio:g} x {counted:,} parameters of {constants.counted}"
    steps, origins["max_steps"] = horizon(given, tokens, why_tokens, batch, flops_per_step)
    rates, why_rates = resolve_rates(constants, given.rates, batch, growth)
    shape, why_shape = resolve_shape(constants, given.shape, steps)
    origins |= why_rates | why_shape | {"max_grad_norm": RECIPE_DEFAULT}
    origins |= {name: STAGE_DEFAULT for name in stage_defaults if origins[name] != GIVEN}
    return Plan(
        recipe=recipe,
        max_steps=steps,
        total_batch_size=batch,
        max_grad_norm=constants.max_grad_norm,
        learning_rate_factor=learning_rate_factor(constants, batch),
        tokens=steps * batch,
        tokens_per_parameter=steps * batch / counted,
        flops=steps * flops_per_step,
        origins=origins,
        **rates,
        **shape,
    )


def get_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"recipe {name} is unknown; take {' or '.join(RECIPES)}")
    return RECIPES[name]


def reference(config: NanoChatConfig, aspect_ratio: int | None = None) -> NanoChatConfig:
    """The same architecture and vocabulary at depth 12, for counting parameters; other fields are not adapted."""
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    per_head = config.hidden_size / heads
    per_layer: float = config.hidden_size / depth if aspect_ratio is None else aspect_ratio
    if aspect_ratio is None and math.ceil(depth * ASPECT_RATIO / per_head) == heads:
        per_layer = ASPECT_RATIO
    reference_heads = math.ceil(round(REFERENCE_DEPTH * per_layer / per_head, 6))
    scale = reference_heads / heads
    other = copy.deepcopy(config)
    other.num_hidden_layers = REFERENCE_DEPTH
    other.num_attention_heads = reference_heads
    other.num_key_value_heads = max(1, round(config.num_key_value_heads * scale))
    other.hidden_size = round(config.hidden_size * scale)
    other.intermediate_size = round(config.intermediate_size * scale)
    return other


def batch_size(constants: Recipe, given: int | None, tokens: int, growth: float, max_length: int) -> tuple[int, str]:
    """Tokens per step and their origin; a derived batch is small enough that tiny models get enough steps.

    Args:
        tokens: Training tokens by the ratio of tokens to parameters.
        growth: `tokens` relative to depth 12.
    """
    if given is not None:
        return given, GIVEN
    best, why = REFERENCE_BATCH_SIZE, RECIPE_DEFAULT
    if constants.scales:
        best = 2 ** round(math.log2(REFERENCE_BATCH_SIZE * growth**BATCH_SIZE_EXPONENT))
        why = f"{REFERENCE_BATCH_SIZE:,} x {growth:.3g}^{BATCH_SIZE_EXPONENT}, to a power of two"
    if best * FEWEST_STEPS > tokens:
        best = 2 ** math.floor(math.log2(max(1, tokens / FEWEST_STEPS)))
        why = f"{tokens:,} tokens / {FEWEST_STEPS} steps, to a power of two"
    rounded = whole_rows(best, max_length)
    return rounded, why if rounded == best else f"{best:,} to whole rows of {max_length:,}"


def horizon(given: Overrides, tokens: int, why_tokens: str, batch: int, flops_per_step: int) -> tuple[int, str]:
    """Optimizer steps and their origin.

    Raises:
        UserError: The run has less than one step.
    """
    if given.max_steps is not None:
        return given.max_steps, GIVEN
    if given.target_flops is not None:
        source, steps = "target_flops", round(given.target_flops / flops_per_step)
        why = f"target_flops {given.target_flops:.3g} / {flops_per_step:.3g} per step"
    else:
        source, steps, why = "target_param_data_ratio", tokens // batch, f"{why_tokens} / {batch:,} tokens"
    if steps < 1:
        raise UserError(f"less than one step: {why}; raise {source}, lower total_batch_size, or give max_steps")
    return steps, why


def learning_rate_factor(constants: Recipe, batch: int) -> float:
    return math.sqrt(batch / REFERENCE_BATCH_SIZE) if constants.scales else 1.0


def resolve_rates(
    constants: Recipe, given: Mapping[str, float | None], batch: int, growth: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Learning rates and weight decay, with their origins, by the names of [`Plan`]'s fields.

    Learning rate x weight decay x D / batch size stays constant. With the derived learning rate this is the original's
    weight decay x sqrt(batch size / reference) x reference D / D; a given rate replaces the derived one.
    """
    factor = learning_rate_factor(constants, batch)
    factors = {name: factor for name in given if name != "weight_decay"}
    relative_lr = given["matrix_lr"] / constants.matrix_lr if given["matrix_lr"] else factor
    factors["weight_decay"] = batch / REFERENCE_BATCH_SIZE / relative_lr / growth if constants.scales else 1.0
    values, origins = {}, {}
    for name, value in given.items():
        usual = getattr(constants, name)
        values[name] = usual * factors[name] if value is None else value
        how = "batch size, rate and tokens" if name == "weight_decay" else "the square root of the batch size"
        derived = f"{usual:g} x {factors[name]:.4g}, by {how}" if constants.scales else RECIPE_DEFAULT
        origins[name] = derived if value is None else GIVEN
    return values, origins


def resolve_shape(
    constants: Recipe, given: Mapping[str, float | None], steps: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The schedule's values, with their origins; short runs get a shorter warm-up unless one is given."""
    values = {name: getattr(constants, name) if value is None else value for name, value in given.items()}
    origins = {name: RECIPE_DEFAULT if value is None else GIVEN for name, value in given.items()}
    longest = steps // STEPS_PER_WARMUP_STEP
    if given["warmup_steps"] is None and longest < constants.warmup_steps:
        values["warmup_steps"], origins["warmup_steps"] = longest, f"{steps} steps / {STEPS_PER_WARMUP_STEP}"
    return values, origins
