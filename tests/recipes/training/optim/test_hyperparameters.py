import pytest
from golden import golden_json
from hypothesis import given
from hypothesis import strategies as st

from modeling_nanochat import NanoChatConfig, NanoChatTurboConfig
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import parameter_counts, scaling_parameters, training_flops_per_token
from recipes.training.optim.hyperparameters import reference, resolve_hyperparameters
from recipes.training.optim.overrides import Overrides

KINDS = [NanoChatConfig, NanoChatTurboConfig]


def resolve(config, recipe, *, max_length, **given):
    return resolve_hyperparameters(config, recipe, Overrides(**given), max_length=max_length)


def test_current_is_the_originals_at_every_depth():
    rows = golden_json("scaling.json")["current"]
    assert len(rows) == 18
    for row in rows:
        config = NanoChatTurboConfig.from_depth(row["depth"])
        plan = resolve(config, "current", max_length=2048, target_param_data_ratio=row["ratio"])
        assert plan.total_batch_size == row["total_batch_size"], row["depth"]
        assert plan.max_steps == row["num_iterations"], row["depth"]
        assert plan.tokens == row["num_iterations"] * row["total_batch_size"] <= row["target_tokens"]
        assert plan.flops == row["total_flops"]
        assert plan.learning_rate_factor == pytest.approx(row["lr_scale"], rel=1e-12)
        assert plan.matrix_lr == pytest.approx(0.02 * row["lr_scale"], rel=1e-12)
        assert plan.embedding_lr == pytest.approx(0.3 * row["lr_scale"], rel=1e-12)
        assert plan.unembedding_lr == pytest.approx(0.008 * row["lr_scale"], rel=1e-12)
        assert plan.scalar_lr == pytest.approx(0.5 * row["lr_scale"], rel=1e-12)
        assert plan.weight_decay == pytest.approx(row["weight_decay_scaled"], rel=1e-12), row["depth"]
        assert plan.max_grad_norm is None


def test_classic_is_the_originals_at_every_depth():
    rows = golden_json("scaling.json")["launch"]
    assert len(rows) == 10
    for row in rows:
        plan = resolve(NanoChatConfig.from_depth(row["depth"]), "classic", max_length=2048)
        assert plan.total_batch_size == 524288
        assert (plan.max_steps, plan.tokens) == (row["num_iterations"], row["tokens"]), row["depth"]
        assert plan.flops == row["total_flops"]
        assert (plan.matrix_lr, plan.embedding_lr, plan.unembedding_lr) == (0.02, 0.2, 0.004)
        assert (plan.weight_decay, plan.max_grad_norm, plan.learning_rate_factor) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "recipe, kind, name",
    [("classic", NanoChatConfig, "schedule_launch"), ("current", NanoChatTurboConfig, "schedule_current")],
)
def test_the_schedule_is_the_recipes(recipe, kind, name):
    golden = golden_json("scaling.json")[name]
    plan = resolve(kind.from_depth(20), recipe, max_length=2048, max_steps=golden["num_iterations"])
    schedule = plan.schedule()
    for point in golden["points"]:
        assert schedule.learning_rate_multiplier(point["step"]) == pytest.approx(point["lr_multiplier"])
        assert schedule.momentum(point["step"]) == pytest.approx(point["muon_momentum"])
    last = golden["num_iterations"] - 1
    assert schedule.weight_decay_multiplier(last) == pytest.approx(1.0 if recipe == "classic" else 0.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["classic", "current"])
def test_either_recipe_plans_either_architecture(kind, recipe):
    config = kind.from_depth(8, vocab_size=32768)
    plan = resolve(config, recipe, max_length=2048)
    counted = parameter_counts(config)["total"] if recipe == "classic" else scaling_parameters(config)
    assert plan.tokens_per_parameter == pytest.approx(20 if recipe == "classic" else 12, rel=0.02)
    assert plan.tokens == plan.max_steps * plan.total_batch_size == pytest.approx(plan.tokens_per_parameter * counted)
    assert plan.flops == plan.tokens * training_flops_per_token(config, 2048)


def test_steps_come_before_flops_and_flops_before_the_ratio():
    config = NanoChatTurboConfig.from_depth(12)
    every = {"max_steps": 7, "target_flops": 1e18, "target_param_data_ratio": 3.0}
    plan = resolve(config, "current", max_length=2048, **every)
    assert plan.max_steps == 7
    plan = resolve(config, "current", max_length=2048, **every | {"max_steps": -1})
    per_step = training_flops_per_token(config, 2048) * plan.total_batch_size
    assert plan.max_steps == round(1e18 / per_step) and abs(plan.flops - 1e18) <= per_step / 2
    plan = resolve(config, "current", max_length=2048, **every | {"max_steps": None, "target_flops": -1})
    assert plan.max_steps == 3 * scaling_parameters(config) // 2**19


def test_what_is_given_is_taken_as_it_is():
    given = {"total_batch_size": 65536, "max_steps": 300, "matrix_lr": 0.05, "embedding_lr": 0.1, "scalar_lr": 0.0}
    given |= {"unembedding_lr": 0.001, "weight_decay": 0.7, "warmup_steps": 3, "warmdown_ratio": 0.5}
    given |= {"final_lr_fraction": 0.25, "momentum_steps": 9, "peak_momentum": 0.8, "final_momentum": 0.7}
    for recipe in ("classic", "current"):
        plan = resolve(NanoChatTurboConfig.from_depth(20), recipe, max_length=2048, **given)
        assert {name: getattr(plan, name) for name in given} == given
        assert {name for name, origin in plan.origins.items() if origin == "given"} == given.keys()
        schedule = plan.schedule()
        assert schedule.learning_rate_multiplier(0) == pytest.approx(1 / 3)
        assert schedule.warmdown_steps == 150 and schedule.final_lr_fraction == 0.25 and schedule.momentum_steps == 9
        assert (schedule.momentum(9), schedule.momentum(300)) == (0.8, pytest.approx(0.7))


@pytest.mark.parametrize("recipe", ["classic", "current"])
def test_a_stages_defaults_replace_the_recipes_and_yield_to_given_values(recipe):
    defaults = {"warmup_steps": 3, "warmdown_ratio": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.5}
    plan = resolve_hyperparameters(
        NanoChatConfig.from_depth(12),
        recipe,
        Overrides(max_steps=300, warmdown_ratio=0.3),
        max_length=2048,
        stage_defaults=defaults,
    )
    assert {name: getattr(plan, name) for name in defaults} == defaults | {"warmdown_ratio": 0.3}
    origins = {name for name, origin in plan.origins.items() if origin == "stage default"}
    assert origins == defaults.keys() - {"warmdown_ratio"} and plan.origins["warmdown_ratio"] == "given"


def test_a_given_batch_size_enters_rates_and_weight_decay():
    config = NanoChatTurboConfig.from_depth(12)
    plan = resolve(config, "current", max_length=2048, total_batch_size=2**17)
    assert plan.learning_rate_factor == 0.5 and plan.matrix_lr == 0.01
    assert plan.weight_decay == pytest.approx(0.28 * 0.5)
    assert plan.max_steps == 12 * scaling_parameters(config) // 2**17


@given(
    matrix_lr=st.floats(1e-4, 1.0),
    batch=st.integers(1, 2000),
    depth=st.integers(2, 30),
)
def test_how_often_weights_are_forgotten_never_changes(matrix_lr, batch, depth):
    """Learning rate x weight decay x training tokens / batch size, whichever of them is given."""
    config = NanoChatConfig.from_depth(depth, vocab_size=32768)
    plan = resolve(config, "current", max_length=2048, total_batch_size=2048 * batch, matrix_lr=matrix_lr, max_steps=5)
    tokens = 12 * scaling_parameters(config)
    reference_tokens = 12 * scaling_parameters(NanoChatConfig.from_depth(12, vocab_size=32768))
    forgotten = plan.matrix_lr * plan.weight_decay * tokens / plan.total_batch_size
    assert forgotten == pytest.approx(0.02 * 0.28 * reference_tokens / 2**19, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aspect_ratio, head_dim", [(64, 128), (64, 64), (32, 32), (48, 64)])
@pytest.mark.parametrize("depth", [1, 4, 5, 12, 13])
def test_the_reference_is_the_dials_model_of_depth_12(kind, aspect_ratio, head_dim, depth):
    shape = {"aspect_ratio": aspect_ratio, "head_dim": head_dim, "vocab_size": 500}
    config, twelve = kind.from_depth(depth, **shape), kind.from_depth(12, **shape)
    assert parameter_counts(reference(config, aspect_ratio)) == parameter_counts(twelve)
    if aspect_ratio == 64 or depth == 12:  # found without being told
        assert parameter_counts(reference(config)) == parameter_counts(twelve)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_queries_and_any_width_are_referred_to_their_like(kind):
    fields = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 500, "head_dim": 24}
    config = kind(vocab_size=300, hidden_size=96, num_hidden_layers=12, **fields)
    assert parameter_counts(reference(config)) == parameter_counts(config)
    plan = resolve(config, "current", max_length=256, total_batch_size=2**19, max_steps=1)
    assert plan.weight_decay == pytest.approx(0.28)


@pytest.mark.parametrize("max_length, expected", [(2048, 2**19), (1000, 524000), (500000, 500000), (2**20, 2**20)])
def test_a_derived_batch_is_whole_rows(max_length, expected):
    for recipe in ("classic", "current"):
        plan = resolve(NanoChatConfig.from_depth(12, vocab_size=32768), recipe, max_length=max_length)
        assert plan.total_batch_size == expected


@pytest.mark.parametrize("recipe", ["classic", "current"])
@pytest.mark.parametrize("layers, width, max_length", [(1, 32, 256), (24, 24, 256), (2, 64, 1000), (4, 128, 256)])
def test_a_tiny_model_still_gets_a_run(recipe, layers, width, max_length):
    config = NanoChatConfig(vocab_size=320, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2)
    plan = resolve(config, recipe, max_length=max_length)
    assert plan.max_steps >= 60 and plan.total_batch_size % max_length == 0
    assert plan.warmup_steps <= plan.max_steps / 10


def test_less_than_one_step_says_what_to_change():
    config = NanoChatConfig.from_depth(1, head_dim=32, aspect_ratio=32, vocab_size=320)
    change = "raise target_param_data_ratio, lower total_batch_size, or give max_steps"
    with pytest.raises(UserError, match=change):
        resolve(config, "current", max_length=2048, total_batch_size=2**20)
    with pytest.raises(UserError, match=change):  # not even one row
        resolve(config, "current", max_length=2**20)
    with pytest.raises(UserError, match="raise target_flops"):
        resolve(config, "current", max_length=2048, target_flops=1.0)


@pytest.mark.parametrize("max_steps, expected", [(5568, 40), (400, 40), (399, 39), (50, 5), (9, 0)])
def test_only_short_runs_warm_up_sooner(max_steps, expected):
    plan = resolve(NanoChatTurboConfig.from_depth(12), "current", max_length=2048, max_steps=max_steps)
    assert plan.warmup_steps == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_steps": 0}, "max_steps is 0; give a positive number"),
        ({"target_flops": -3.0}, "target_flops is -3.0"),
        ({"target_param_data_ratio": float("nan")}, "target_param_data_ratio is nan"),
        ({"total_batch_size": 5000}, "total_batch_size 5000 must be a multiple of max_length 2048; take 4096"),
        ({"max_length": 0}, "max_length is 0"),
        ({"matrix_lr": -0.1}, "matrix_lr is -0.1; it must not be negative"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmdown_ratio": 1.5}, "warmdown_ratio is 1.5; it is a share"),
        ({"peak_momentum": 1.1}, "peak_momentum is 1.1; it is a share"),
    ],
)
def test_impossible_values_are_named(given, message):
    with pytest.raises(UserError, match=message):
        resolve(NanoChatConfig.from_depth(12), "current", **{"max_length": 2048} | given)


def test_an_unknown_recipe_is_named():
    with pytest.raises(UserError, match="recipe modern is unknown; take classic or current"):
        resolve(NanoChatConfig.from_depth(4), "modern", max_length=2048)


def test_the_printed_plan_says_every_value_and_where_it_comes_from():
    plan = resolve(NanoChatTurboConfig.from_depth(20), "current", max_length=2048, embedding_lr=0.25)
    lines = plan.lines()
    assert "4,980 steps of 1,048,576 tokens = 5,221,908,480 tokens" in lines[0]
    assert any(line.startswith("  derived: weight_decay 0.1002 = 0.28 x") for line in lines)
    assert "  given: embedding_lr 0.25" in lines
    for name in plan.origins:
        assert sum(f" {name} " in line for line in lines[1:]) == 1, name
    assert len(lines) <= 10 and all("\n" not in line for line in lines)
