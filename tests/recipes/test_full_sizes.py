"""What the recipes train at full size, computed from their YAMLs, beside the original's published figures."""

import re

import pytest

from modeling_nanochat.cli import parse
from modeling_nanochat.sizes import parameter_counts, scaling_parameters, training_flops_per_token
from recipes.grpo import GRPOArguments
from recipes.ladder.arguments import LADDER, RunArguments, parse_overrides
from recipes.ladder.commands import RECIPES, steps
from recipes.ladder.estimate.hardware import choose_hardware
from recipes.ladder.estimate.machine import rows_that_fit
from recipes.ladder.estimate.table import estimate
from recipes.ladder.launch import launch_file
from recipes.ladder.step import read_yaml
from recipes.miniseries.train import MiniseriesArguments, Run, optima, planned, training_step
from recipes.pretrain import PretrainArguments, make_config, make_plan
from recipes.sft import SFTArguments
from recipes.training.arguments import LoopArguments
from recipes.training.data.mixtures import parse_mixture
from recipes.training.stage import OutputArguments
from recipes.training.trl.settings import GRPOSettings, SFTSettings, passes_of_a_step

ROWS = {  # of the published data sets' splits
    "HuggingFaceTB/smol-smoltalk": 460_000,
    "cais/mmlu:all:auxiliary_train": 99_800,
    "openai/gsm8k:main:train": 7_473,
    "allenai/ai2_arc:ARC-Easy:train": 2_251,
    "allenai/ai2_arc:ARC-Challenge:train": 1_119,
    "identity.jsonl": 1_000,
}


def pretraining(recipe: str, overrides: tuple[str, ...] = (), **changes):
    """The configuration and the plan of a recipe's pretraining; `changes` replace loop settings."""
    settings = parse_overrides(overrides)
    config = RECIPES / recipe / "pretrain.yaml"
    args, loop, _ = parse(
        PretrainArguments, LoopArguments, OutputArguments, args=["--config", str(config), *settings["base"]]
    )
    vars(loop).update(changes)
    vocabulary = dict([settings["tokenizer"]]).get("--vocab_size") if settings["tokenizer"] else None
    config = make_config(args, loop, int(vocabulary or read_yaml(RECIPES / recipe / "tokenizer.yaml")["vocab_size"]))
    return config, make_plan(config, args, loop)


def mixture_rows(recipe: str, stage: str) -> int:
    """The rows of a stage's mixture, repeated ones as often as they are read."""
    sources = parse_mixture(read_yaml(RECIPES / recipe / f"{stage}.yaml")["mixture"], "mixture")
    return sum(round((s.rows or ROWS[s.source.removeprefix(f"runs/{recipe}/data/")]) * s.epochs) for s in sources)


def test_the_speedrun_is_the_original_d20_of_the_launch():
    config, plan = pretraining("speedrun")
    assert parameter_counts(config)["total"] == 560_988_160
    assert training_flops_per_token(config) == pytest.approx(3.491758e9, rel=1e-6)
    assert (plan.max_steps, plan.total_batch_size, plan.tokens) == (21_400, 524_288, 11_219_763_200)
    assert plan.flops == pytest.approx(3.917670e19, rel=1e-6)
    assert (plan.matrix_lr, plan.embedding_lr, plan.unembedding_lr, plan.weight_decay) == (0.02, 0.2, 0.004, 0)
    assert (plan.warmup_steps, plan.warmdown_ratio, plan.final_lr_fraction) == (0, 0.2, 0)
    assert rows_that_fit(config, plan.total_batch_size, choose_hardware("8xh100")) == 32


def test_the_thousand_dollar_recipe_is_the_original_d32():
    config, plan = pretraining("thousand")
    assert parameter_counts(config)["total"] == 1_879_048_192
    assert (plan.max_steps, plan.total_batch_size, plan.tokens) == (71_680, 524_288, 37_580_963_840)
    assert plan.flops == pytest.approx(4.539628e20, rel=1e-6)
    assert rows_that_fit(config, plan.total_batch_size, choose_hardware("8xh100")) == 8


def test_gpt2_has_the_size_and_the_schedule_of_the_fastest_public_run():
    config, plan = pretraining("gpt2")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (22, 1408, 49_152)
    assert scaling_parameters(config) == 592_577_964
    assert (plan.max_steps, plan.total_batch_size) == (5_312, 1_048_576)
    assert pretraining("gpt2", total_batch_size=None)[1].total_batch_size == 1_048_576
    assert (plan.warmup_steps, plan.warmdown_ratio, plan.final_lr_fraction) == (40, 0.85, 0)
    assert plan.matrix_lr == pytest.approx(0.02 * 2**0.5)
    assert rows_that_fit(config, plan.total_batch_size, choose_hardware("8xh100")) == 16


def test_the_second_size_of_gpt2_is_run_6_of_the_leaderboard():
    config, plan = pretraining("gpt2", tuple(read_yaml(RECIPES / "gpt2" / "d24.yaml")["set"]))
    assert parameter_counts(config)["total"] == 1_384_122_122
    assert (plan.max_steps, plan.total_batch_size) == (5_568, 1_048_576)
    assert (plan.warmdown_ratio, plan.final_lr_fraction) == (0.65, 0.05)


def test_the_laptop_trains_82_million_tokens_with_the_rates_that_sft_states():
    config, plan = pretraining("laptop")
    assert parameter_counts(config)["total"] == 23_199_744
    assert plan.tokens == 81_920_000
    fraction = read_yaml(RECIPES / "laptop" / "sft.yaml")["init_lr_fraction"]
    assert fraction * 0.02 == pytest.approx(0.8 * plan.matrix_lr, rel=0.02)


def test_midtraining_and_sft_have_the_rows_of_the_original():
    for recipe in ("speedrun", "thousand"):
        assert 848_000 < mixture_rows(recipe, "midtrain") < 851_000
        assert mixture_rows(recipe, "sft") == 22_443
    rows = 460_000 + 3 * 99_800 + 4 * 7_473 + 2 * 1_000 + 280_000
    assert mixture_rows("gpt2", "sft") == rows


def trl_settings(recipe: str, stage: str):
    """The trainer's settings on one process."""
    types = {"sft": (SFTArguments, SFTSettings), "grpo": (GRPOArguments, GRPOSettings)}[stage]
    return parse(*types, args=["--config", str(RECIPES / recipe / f"{stage}.yaml"), "--use_cpu", "true"])[1]


def test_a_step_of_sft_is_32_conversations_on_eight_processes_and_the_stage_701_steps():
    for recipe in ("speedrun", "thousand"):
        training = trl_settings(recipe, "sft")
        assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
        assert not training.packing and mixture_rows(recipe, "sft") // 32 == 701


def test_a_step_of_gpt2s_sft_has_as_many_tokens_as_one_of_its_pretraining():
    training = trl_settings("gpt2", "sft")
    rows = 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert rows * training.max_length == pretraining("gpt2")[1].total_batch_size


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_reinforcement_learning_takes_467_steps_of_16_problems_on_any_number_of_gpus(processes, monkeypatch):
    training = trl_settings("speedrun", "grpo")
    rows, completions = training.per_device_train_batch_size, 16 * training.num_generations
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert rows * passes_of_a_step(completions, rows) * processes == completions
    assert ROWS["openai/gsm8k:main:train"] * training.num_generations // completions == 467


def columns_of_steps(text: str) -> dict[str, list[str]]:
    """The cells of each line of a table that `--dry_run` prints, by the step's name."""
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    return {name: cells for name, *cells in lines if len(cells) == 8 and cells[-1].replace(".", "").isdigit()}


@pytest.mark.parametrize("recipe", ["speedrun", "gpt2", "thousand"])
def test_the_readme_shows_the_plan_for_eight_h100s(recipe):
    """Sizes to the digit; hours and dollars to a tenth, since the speeds behind them are measured again and again."""
    (args,) = parse(RunArguments, args=["--config", str(RECIPES / recipe / "run.yaml")])
    ladder = [step for stage in LADDER for step in steps(stage, RECIPES / recipe, args, parse_overrides([]))]
    planned = columns_of_steps(estimate(recipe, ladder, launch_file(args.accelerate_config)[1], "8xh100"))
    shown = columns_of_steps((RECIPES / recipe / "README.md").read_text())
    assert len(shown) > 6 and {name: cells[:5] for name, cells in shown.items()} == {
        name: cells[:5] for name, cells in planned.items()
    }
    for place in (-1, -2):
        assert float(shown["total"][place]) == pytest.approx(float(planned["total"][place]), rel=0.1)


def test_the_miniseries_has_the_steps_of_the_original():
    (args,) = parse(MiniseriesArguments, args=["--config", str(RECIPES / "miniseries" / "series.yaml")])
    runs = {depth: planned(training_step(args, depth, None), args, None) for depth in args.depths}
    expected = {12: 2_520, 16: 5_376, 20: 4_980, 24: 8_352, 26: 10_510}
    assert {depth: runs[depth].steps for depth in expected} == expected
    assert runs[24].parameters == 1_384_122_122 and list(runs) == list(range(12, 27, 2))


def test_each_run_of_the_sweep_has_the_flops_that_it_is_given():
    (args,) = parse(MiniseriesArguments, args=["--config", str(RECIPES / "miniseries" / "scaling.yaml")])
    assert len(args.depths) * len(args.flops) == 24
    for budget in args.flops:
        runs = [planned(training_step(args, depth, budget), args, budget) for depth in (10, 20)]
        assert all(run.flops == pytest.approx(budget, rel=0.005) for run in runs)
        assert runs[0].tokens > runs[1].tokens


def test_the_best_size_is_the_minimum_of_the_parabola_and_none_where_the_runs_do_not_enclose_it():
    def sweep(budget: float, best: float) -> list[Run]:
        sizes = [1e7 * 2**n for n in range(5)]
        losses = {n: 0.8 + 0.05 * (n - best) ** 2 for n in range(5)}
        return [
            Run(0, 0, 0, round(size), 0, round(budget / 6 / size), 0.0, budget, budget, losses[n])
            for n, size in enumerate(sizes)
        ]

    found = optima([*sweep(1e18, 1.5), *sweep(1e19, 2.5), *sweep(1e20, 9.0)])
    assert [budget for budget, _, _ in found] == [1e18, 1e19]
    for (budget, size, tokens), best in zip(found, (1.5, 2.5), strict=True):
        assert size == pytest.approx(1e7 * 2**best, rel=1e-3) and tokens == pytest.approx(budget / 6 / size, rel=1e-3)
