import pytest
import torch
from golden import golden_json

from recipes.training.optim.schedule import Schedule

CLASSIC = {
    "warmup_steps": 0,
    "warmdown_ratio": 0.2,
    "final_lr_fraction": 0.0,
    "momentum_steps": 300,
    "peak_momentum": 0.95,
    "final_momentum": 0.95,
    "final_weight_decay_fraction": 1.0,
}


@pytest.mark.parametrize(
    "name, fields", [("schedule_launch", CLASSIC), ("schedule_current", {}), ("schedule_current_short", {})]
)
def test_every_point_is_the_originals(name, fields):
    golden = golden_json("scaling.json")[name]
    schedule = Schedule(golden["num_iterations"], **fields)
    assert len(golden["points"]) >= 9
    for point in golden["points"]:
        it = point["step"]
        assert schedule.learning_rate_multiplier(it) == pytest.approx(point["lr_multiplier"], rel=1e-12), it
        assert schedule.momentum(it) == pytest.approx(point["muon_momentum"], rel=1e-12), it
        if "weight_decay_fraction" in point:
            expected = pytest.approx(point["weight_decay_fraction"], rel=1e-6)
            assert schedule.weight_decay_multiplier(it) == expected, it


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 399, 1000])
@pytest.mark.parametrize("fields", [CLASSIC, {}], ids=["classic", "current"])
def test_runs_of_any_length_stay_within_the_bounds(steps, fields):
    schedule = Schedule(steps, **fields)
    for it in range(steps):
        assert 0 < schedule.learning_rate_multiplier(it) <= 1
        assert 0.85 <= schedule.momentum(it) <= schedule.peak_momentum
        assert schedule.final_weight_decay_fraction <= schedule.weight_decay_multiplier(it) <= 1


def test_without_a_warm_down_the_rate_stays():
    schedule = Schedule(100, warmup_steps=0, warmdown_ratio=0.0, momentum_steps=0)
    assert {schedule.learning_rate_multiplier(it) for it in range(101)} == {1.0}
    assert {schedule.momentum(it) for it in range(101)} == {0.97}


def two_groups() -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    rules = {"kind": "muon", "weight_decay": 0.1, "momentum": 0.0}, {"kind": "adamw", "weight_decay": 0.3}
    groups = [{"params": [p], "lr": 0.02} | rule for p, rule in zip(parameters, rules, strict=True)]
    return torch.optim.SGD(groups, lr=0.0)


def test_applied_again_and_again_it_starts_from_the_first_values():
    optimizer = two_groups()
    muon, adamw = optimizer.param_groups
    schedule = Schedule(100, warmup_steps=10, warmdown_ratio=0.5, final_lr_fraction=0.0, momentum_steps=20)
    for it in (0, 75, 50, 99, 75):
        schedule.apply(optimizer, it)
    assert muon["lr"] == adamw["lr"] == pytest.approx(0.01)
    assert muon["momentum"] == pytest.approx(0.935)
    assert muon["weight_decay"] == pytest.approx(0.1 * schedule.weight_decay_multiplier(75))
    assert adamw["weight_decay"] == 0.3 and adamw["momentum"] == 0


def test_the_classic_recipe_leaves_weight_decay_alone():
    optimizer = two_groups()
    for it in (0, 50, 99):
        Schedule(100, **CLASSIC).apply(optimizer, it)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
