"""Sampling options: their ranges, their effects compared with transformers' logits processors, and the draw."""

import itertools
import math
import random
from dataclasses import fields, replace

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_nanochat.chat.sampling import Sampler, SamplingOptions, filter_logits, penalize_repetition
from modeling_nanochat.errors import UserError

VOCABULARY = 100
COMBINATIONS = [
    SamplingOptions(*values)
    for values in itertools.product(
        (0.3, 1.0, 1.7), (None, 1, 7, 50, 10**30), (1.0, 0.9, 0.4, 0), (0.0, 0.05, 0.5, 1), (1.0, 1.3, 0.7)
    )
]


def by_transformers(logits, options, seen):
    """Logits (1, V) after the processors that `generate` would use, in its order."""
    steps = LogitsProcessorList()
    if options.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.temperature != 1:
        steps.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(MinPLogitsWarper(options.min_p))
    return steps(torch.tensor([sorted(seen)], dtype=torch.long), logits)


def by_us(logits, options, seen):
    filtered, ids = filter_logits(penalize_repetition(logits, options, seen), options)
    return torch.full_like(logits, -math.inf).scatter(1, ids, filtered)


def random_logits(kind, rows, seed=0):
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    kinds = {
        "ties": logits.round(),
        "equal": torch.ones_like(logits),
        "extreme": logits * 50,
    }  # some probabilities are 0
    return ({"distinct": logits} | kinds)[kind]


def random_seen(rows, seed=0):
    drawn = random.Random(seed)
    return [set(drawn.sample(range(VOCABULARY), drawn.choice((0, 5, 60)))) for _ in range(rows)]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
def test_a_row_is_filtered_exactly_as_transformers_does(kind):
    for index, options in enumerate(COMBINATIONS):
        logits, seen = random_logits(kind, 1, index), random_seen(1, index)
        ours, theirs = by_us(logits, [options], seen), by_transformers(logits, options, seen[0])
        assert torch.equal(ours, theirs), options
        assert theirs.isfinite().any()


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
def test_rows_with_different_options_are_filtered_as_each_is_alone(kind):
    for seed in range(20):
        options = random.Random(seed).choices(COMBINATIONS, k=16)
        logits, seen = random_logits(kind, 16, seed), random_seen(16, seed)
        together = by_us(logits, options, seen)
        for row in range(16):
            alone = by_transformers(logits[row : row + 1], options[row], seen[row])
            assert torch.equal(together[row : row + 1], alone), options[row]


def test_every_option_has_an_effect_on_its_row_only():
    logits, seen = random_logits("distinct", 3), random_seen(3, 4)
    plain = SamplingOptions(1.0, top_k=None)
    changes = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 2.0}
    assert [entry.name for entry in fields(SamplingOptions)] == [*changes, "stop_strings"]
    assert torch.equal(by_us(logits, [plain] * 3, seen), logits)
    for name, value in changes.items():
        changed = by_us(logits, [plain, replace(plain, **{name: value}), plain], seen)
        assert [torch.equal(changed[row], logits[row]) for row in range(3)] == [True, False, True], name


def sampler(seed=0):
    return Sampler(torch.Generator().manual_seed(seed))


def test_tokens_are_drawn_by_their_filtered_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0]]).repeat(500, 1)
    for options, possible in [
        (SamplingOptions(0, None), {1}),
        (SamplingOptions(1e-40, None), {1}),
        (SamplingOptions(1.0, 1), {1}),
        (SamplingOptions(1.0, 2), {1, 2}),
        (SamplingOptions(1.0, 0), {0, 1, 2}),
        (SamplingOptions(1.0, 99), {0, 1, 2}),
        (SamplingOptions(1.0, None, top_p=0.7), {1, 2}),
        (SamplingOptions(1.0, 3, top_p=0.5), {1}),
        (SamplingOptions(1.0, None, min_p=0.2), {1, 2}),
    ]:
        assert set(sampler()(logits, options).tolist()) == possible, options
    for options in (SamplingOptions(0.5, None), SamplingOptions(0.5, 3), SamplingOptions(0.5, 3, min_p=0.01)):
        drawn = sampler()(logits, options).bincount(minlength=3) / 500
        assert torch.allclose(drawn, (logits[0] / 0.5).softmax(-1), atol=0.06)


def test_tokens_as_likely_as_the_last_of_top_k_can_be_drawn_too():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]]).repeat(300, 1)
    assert set(sampler()(logits, SamplingOptions(1.0, 1)).tolist()) == {1, 2, 4}


def test_a_batch_may_mix_greedy_rows_with_others():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]]).repeat(400, 1)
    for others in (SamplingOptions(1.0, 3), SamplingOptions(1.0, None)):
        drawn = sampler()(logits, [SamplingOptions(0, None), others] * 200)
        assert set(drawn[::2].tolist()) == {1}  # the first, as argmax
        assert {1, 2, 3} <= set(drawn[1::2].tolist())


def test_a_greedy_row_takes_the_most_likely_token_after_the_penalty():
    logits = torch.tensor([[-1.0, 2.0, 1.5, 1.0]]).repeat(3, 1)
    options = [SamplingOptions(0, 2, repetition_penalty=penalty) for penalty in (1.0, 1.5, 1.5)]
    assert sampler()(logits, options, [{1, 0}, {1, 0}, {2, 0}]).tolist() == [1, 2, 1]
    likely = torch.tensor([[-1.0, -1.5]])
    assert sampler()(likely, SamplingOptions(0, repetition_penalty=2.0), [[0, 0]]).tolist() == [1]


@pytest.mark.parametrize("top_k", [None, 0, 1, 50, 200])
def test_a_seed_gives_the_same_tokens_as_before_there_were_other_options(top_k):
    logits, ours, theirs = random_logits("distinct", 8), sampler(3), torch.Generator().manual_seed(3)
    for _ in range(5):
        scaled = logits / 0.6
        values, ids = scaled.topk(min(top_k, VOCABULARY)) if top_k else (scaled, torch.arange(VOCABULARY).repeat(8, 1))
        choice = torch.multinomial(values.softmax(-1), 1, generator=theirs)
        assert torch.equal(ours(logits, SamplingOptions(0.6, top_k)), ids.gather(1, choice)[:, 0])


@pytest.mark.parametrize(
    ("option", "range_"),
    [
        *[({"temperature": x}, "a number from 0 to 2") for x in (-0.1, 2.1, math.nan, math.inf, None, "1", True)],
        *[({"top_k": x}, "a whole number of at least 0") for x in (-1, 2.5, math.inf, "5", False)],
        *[({"top_p": x}, "a number from 0 to 1") for x in (-0.1, 1.1, math.nan, None, "1", True)],
        *[({"min_p": x}, "a number from 0 to 1") for x in (-0.1, 1.1, None)],
        *[({"repetition_penalty": x}, "a number from 0.1 to 10") for x in (0, -1, 11, None)],
        *[({"stop_strings": x}, "a tuple of texts") for x in ("END", ["END"], ("",), (3,), None)],
    ],
    ids=str,
)
def test_an_option_of_the_wrong_kind_or_out_of_range_is_one_line(option, range_):
    ((name, value),) = option.items()
    with pytest.raises(UserError) as error:
        SamplingOptions(**option)
    assert str(error.value).startswith(f"{name} must be {range_}") and str(error.value).endswith(f"not {value!r}")


def test_what_a_generation_config_does_not_set_keeps_its_default():
    assert SamplingOptions.from_generation_config(GenerationConfig()) == SamplingOptions()
    assert SamplingOptions() == SamplingOptions(0.6, 50, 1.0, 0.0, 1.0, ())
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, min_p=0.1, stop_strings=["a", "b"])
    assert SamplingOptions.from_generation_config(config) == SamplingOptions(
        1.0, 0, min_p=0.1, stop_strings=("a", "b")
    )
    greedy = SamplingOptions.from_generation_config(GenerationConfig(do_sample=False, temperature=0.7, top_p=0.9))
    assert greedy == SamplingOptions(0, top_p=0.9) and greedy.is_greedy
