import math

import pytest
import torch
from accelerate import Accelerator, debug_launcher

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from recipes.loop import LoopArguments, accumulate, accumulation_steps, train
from recipes.stage import StageLog
from recipes.validation import validation


def small_model():
    torch.manual_seed(0)
    config = NanoChatConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = NanoChatForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # at zero, nothing else would have a gradient
    return model


def uneven_batches():
    """Four micro-batches; only the first tokens of some rows are learnt, so that their means differ."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for keep in (16, 3, 9, 1):
        ids = torch.randint(0, 64, (2, 17), generator=generator)
        labels = ids.clone()
        labels[:, keep + 1 :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def step_gradients(path):
    """Loss and gradients of one step over this process's share of the four micro-batches."""
    accelerator = Accelerator(cpu=True)
    model = small_model()
    module = accelerator.prepare(model)
    mine = uneven_batches()[accelerator.process_index :: accelerator.num_processes]
    loss = accumulate(accelerator, module, mine)
    if accelerator.is_main_process:
        torch.save({"loss": loss, "grads": [p.grad for p in model.parameters()]}, path)
    accelerator.wait_for_everyone()


def test_gradients_are_of_the_mean_over_all_learnt_tokens(tmp_path):
    step_gradients(tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    model = small_model()
    losses, count = [], 0
    for batch in uneven_batches():
        logits = model(batch["input_ids"][:, :-1], use_cache=False).logits
        targets = batch["labels"][:, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    mean = sum(losses) / count
    mean.backward()
    assert one["loss"] == pytest.approx(mean.item(), rel=1e-5)
    for grad, p in zip(one["grads"], model.parameters(), strict=True):
        assert (grad - p.grad).abs().max() < 1e-6


def test_two_processes_give_the_gradients_of_one(tmp_path):
    step_gradients(tmp_path / "one.pt")
    debug_launcher(step_gradients, args=(tmp_path / "two.pt",), num_processes=2)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    for a, b in zip(one["grads"], two["grads"], strict=True):
        assert (a - b).abs().max() < 1e-6


def loop_arguments(**more):
    return LoopArguments(
        max_length=16, per_device_train_batch_size=2, total_batch_size=64, warmup_steps=2, momentum_steps=5, eval_steps=5, **more
    )


def rows(count, seed=0):
    """A tiny language: each token is followed by the next one."""
    starts = torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))
    ids = (starts[:, None] + torch.arange(17)) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


def batches_of(some):
    while True:
        for i in range(0, len(some), 2):
            yield {key: torch.stack([row[key] for row in some[i : i + 2]]) for key in ("input_ids", "labels")}


def run(tmp_path, name, toy_tokenizer, **more):
    accelerator = Accelerator(cpu=True)
    evaluate = validation(accelerator, rows(8, seed=5), toy_tokenizer, 2, 8)
    model = small_model()
    progress = train(
        accelerator, model, batches_of(rows(64)), loop_arguments(max_steps=20, **more), evaluate, StageLog(tmp_path / name)
    )
    return model, progress


def test_training_learns_and_repeats_itself_exactly(tmp_path, toy_model_and_tokenizer):
    tokenizer = toy_model_and_tokenizer[1]
    model, progress = run(tmp_path, "a", tokenizer)
    again, _ = run(tmp_path, "b", tokenizer)
    assert progress.steps == 20 and progress.tokens == 20 * 64 and progress.loss < 2.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert model.training
    logged = (tmp_path / "logs" / "a.jsonl").read_text()
    assert logged.count("bits_per_byte") == 5 and "tokens_per_second" in logged


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(UserError, match="step 0"):
        train(
            Accelerator(cpu=True), model, batches_of(rows(8)), loop_arguments(max_steps=3), None, StageLog(tmp_path / "c")
        )
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_batch_that_does_not_divide_is_refused():
    assert accumulation_steps(loop_arguments(), world_size=2) == 1
    with pytest.raises(UserError, match="multiple of 96"):
        accumulation_steps(loop_arguments(), world_size=3)


def test_validation_needs_a_row(toy_model_and_tokenizer):
    with pytest.raises(UserError, match="does not fill one row"):
        validation(Accelerator(cpu=True), [], toy_model_and_tokenizer[1], 2, 8)
