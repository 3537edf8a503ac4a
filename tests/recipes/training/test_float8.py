"""Whether float8 learns as float32 does: the same training twice, once with float8's rounding in the large layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import float8
import pytest
import torch
from pyarrow import parquet

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from recipes.pocket.world import WorldArguments, write_world
from recipes.training.device import computes_in_float8, evaluation_precision
from recipes.training.evaluation import text_rows
from recipes.training.optim.hyperparameters import resolve_hyperparameters
from recipes.training.optim.optimizer import muon_adamw
from recipes.training.optim.overrides import Overrides
from tokenizer_train.bpe import train_tokenizer

VOCABULARY = 1344
LENGTH = 256  # tokens of a row
DIFFERENCE = 0.01  # of the losses, relative
SATURATING = 2.0**6  # all above a 64th of the largest number becomes one number
RATES = ("recipe", "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay")


@dataclass(frozen=True)
class Course:
    """Losses of a run: of each step, in training's numbers, and on text held out, without float8."""

    steps: list[float]
    held_out: float

    @property
    def at_the_end(self) -> float:
        last = self.steps[-max(1, len(self.steps) // 10) :]
        return sum(last) / len(last)


def packed(texts: str, tokenizer, rows: int) -> torch.Tensor:
    found = [row["input_ids"] for row in islice(text_rows([texts], tokenizer, LENGTH, "texts"), rows)]
    assert len(found) == rows, "the text is too short"
    return torch.stack(found)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """A function of the numbers of rows: ids to train on and ids held out, of pocket's text."""
    folder = tmp_path_factory.mktemp("pocket") / "data"
    small = dict.fromkeys(("midtrain_conversations", "sft_conversations", "grpo_problems", "grpo_dialogues"), 10)
    write_world(WorldArguments(output_dir=str(folder), **small, eval_questions=10, eval_unknown=10))
    train, held_out = (str(folder / "pretrain" / f"{name}.parquet") for name in ("train", "val"))
    texts = parquet.read_table(train)["text"].to_pylist()[:2000]
    tokenizer = train_tokenizer(texts, VOCABULARY, model_max_length=LENGTH)
    return lambda rows: (packed(train, tokenizer, rows), packed(held_out, tokenizer, 64))


def batches(ids: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    return iter(ids.split(rows))


def loss_of(model: NanoChatForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], use_cache=False).loss


def course(
    depth: int, rows: int, ids: torch.Tensor, held_out: torch.Tensor, scale_error: float | None = None
) -> Course:
    """Train a model of `depth` from scratch on all of `ids`; in float8 unless `scale_error` is None."""
    config = NanoChatConfig.from_depth(depth, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    torch.manual_seed(0)
    model = NanoChatForCausalLM(config).train()
    if scale_error is not None:
        float8.convert_to_float8_training(
            model, module_filter_fn=computes_in_float8, config=float8.Float8LinearConfig(emulate=True)
        )
        layers = [module for module in model.modules() if isinstance(module, float8.Float8Linear)]
        assert len(layers) == 6 * depth
        for layer in layers:
            layer.scale_error = scale_error
    steps = len(ids) // rows
    overrides = Overrides(max_steps=steps, total_batch_size=rows * LENGTH)
    plan = resolve_hyperparameters(config, "current", overrides, max_length=LENGTH)
    optimizer, schedule = muon_adamw(model, **{name: getattr(plan, name) for name in RATES}), plan.schedule()
    losses = []
    for step, batch in enumerate(batches(ids, rows)):
        schedule.apply(optimizer, step)
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    with torch.no_grad(), evaluation_precision(model):
        return Course(losses, loss_of(model, held_out).item())


def assert_alike(found: Course, expected: Course) -> None:
    assert found.at_the_end == pytest.approx(expected.at_the_end, rel=DIFFERENCE)
    assert found.held_out == pytest.approx(expected.held_out, rel=DIFFERENCE)


@pytest.mark.slow
def test_float8_learns_as_float32_does_for_a_while_and_not_with_a_wrong_scale(pocket):
    """Two layers of 128 channels, 65,536 tokens."""
    ids, held_out = pocket(256)
    expected = course(2, 4, ids, held_out)
    assert expected.steps[0] > 7 and expected.held_out < 5.2  # it learns
    assert_alike(course(2, 4, ids, held_out, scale_error=1.0), expected)
    with pytest.raises(AssertionError):
        assert_alike(course(2, 4, ids, held_out, scale_error=SATURATING), expected)


@pytest.mark.long
def test_float8_learns_as_float32_does_over_a_million_tokens(pocket):
    """d4, 256 channels; half an hour on one core."""
    ids, held_out = pocket(4096)
    assert ids[:, 1:].numel() >= 10**6
    expected = course(4, 8, ids, held_out)
    assert_alike(course(4, 8, ids, held_out, scale_error=1.0), expected)
    with pytest.raises(AssertionError):
        assert_alike(course(4, 8, ids, held_out, scale_error=SATURATING), expected)


@pytest.mark.parametrize("dtype", [float8.INPUTS, float8.GRADIENTS])
def test_rounding_keeps_as_many_digits_as_the_format_has(dtype):
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    error = (float8.rounded(numbers, dtype) - numbers).abs()
    half_a_digit = torch.finfo(dtype).eps / 2
    normal = numbers.abs() > 0.02 * numbers.abs().max()
    assert (error <= 1.001 * half_a_digit * numbers.abs())[normal].all() and (error > 0).float().mean() > 0.9
    assert float8.rounded(numbers, dtype).abs().max() == pytest.approx(numbers.abs().max().item(), rel=1e-6)
    assert torch.equal(float8.rounded(torch.zeros(3), dtype), torch.zeros(3))


def test_the_emulation_computes_what_torchao_computes():
    torchao = pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False)),
        torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False)),
    )
    theirs.load_state_dict(ours.state_dict())
    convert = {"module_filter_fn": computes_in_float8}
    ours = float8.convert_to_float8_training(ours, config=float8.Float8LinearConfig(), **convert)
    theirs = torchao.convert_to_float8_training(theirs, config=torchao.Float8LinearConfig(emulate=True), **convert)
    inputs, gradient = torch.randn(3, 16, 128), torch.randn(3, 16, 256)
    found = []
    for layer in (ours, theirs):
        given = inputs.clone().requires_grad_()
        output = layer(given)
        output.backward(gradient)
        found.append((output, given.grad, layer[0].weight.grad))
    for mine, right in zip(*found, strict=True):
        assert torch.allclose(mine, right, rtol=1e-5, atol=1e-5)
