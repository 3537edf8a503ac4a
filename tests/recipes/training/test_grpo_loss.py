"""What GRPO's loss is computed from and how it is normalised, compared with the original's formula."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from training import forkserver, run

import recipes.training.trl.rewards as rewards
import recipes.training.trl.rollouts as trl_rollouts
from modeling_nanochat.loading import load_model_and_tokenizer
from recipes.grpo import NanoChatGRPOTrainer, main, read_problems
from recipes.training.data.bad_rows import BadRows
from recipes.training.trl.settings import GRPOSettings, passes_of_a_step


def write_problems(path, count):
    records = [{"question": f"What is {n}+7?", "answer": f"#### {n + 7}"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def number_of_tokens(completions, completion_ids, **kwargs):
    return [len(ids) % 5 + ids[0] % 3 for ids in completion_ids]


def trainer_of(folder, tmp_path, **settings):
    """A trainer of 4 problems with 4 completions each, as one batch."""
    model, tokenizer = load_model_and_tokenizer(folder, dtype=torch.float32, device="cpu")
    args = GRPOSettings(
        **{"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 16, "bf16": False,
           "gradient_accumulation_steps": 1, "max_completion_length": 24, "max_steps": 1, "use_cpu": True,
           "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 3} | settings
    )  # fmt: skip
    return NanoChatGRPOTrainer(
        model=model,
        args=args,
        train_dataset=read_problems([str(write_problems(tmp_path / "problems.jsonl", 4))], BadRows()),
        processing_class=tokenizer,
        reward_funcs=number_of_tokens,
        muon_rates={"matrix_lr": 0.0, "embedding_lr": 0.0, "unembedding_lr": 0.0},
    )


def scripted(prompts, trainer):
    """Completions of different lengths, some with a call and its result, that depend on prompt and number only."""
    codec, first = trainer.engine.codec, trainer.accelerator.process_index * len(prompts)
    rendered = [codec.prompt(prompt) for prompt in prompts]
    found = {"prompt_ids": rendered, "completion_ids": [], "logprobs": None, "env_mask": [], "reply": []}
    for number, prompt in enumerate(rendered, start=first):
        kind = (sum(prompt) + 5 * (number % 4)) % 7
        before, after = [40 + number % 4] * (kind + 1), [60] * kind
        forced = [codec.output_start, *codec.encode("19"), codec.output_end] if kind % 2 else []
        found["completion_ids"].append([*before, *forced, *after])
        found["env_mask"].append([1] * len(before) + [0] * len(forced) + [1] * len(after))
        found["reply"].append([{"role": "assistant", "content": "19"}])
    return found


def gradients_of_a_step(trainer, monkeypatch):
    """Name -> gradient of the first step, and the batches that the loss was computed from."""
    found, batches, loss_of = {}, [], type(trainer)._compute_loss

    def keep(self, model, inputs):
        batches.append(inputs)
        return loss_of(self, model, inputs)

    monkeypatch.setattr(type(trainer), "_compute_loss", keep)
    observe = trainer.learning.on_pre_optimizer_step

    def before_the_optimizer(args, state, control, model=None, **kwargs):
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        observe(args, state, control, model=model, **kwargs)

    monkeypatch.setattr(trainer.learning, "on_pre_optimizer_step", before_the_optimizer)
    trainer.train()
    return found, batches


def reference_gradients(trainer, prompts):
    """The original's objective: for each problem sum(logp * A) / tokens, averaged over the problems."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.zero_grad()
    for prompt in prompts:
        found = scripted([prompt] * 4, trainer)
        completions, masks = found["completion_ids"], found["env_mask"]
        reward = torch.tensor(number_of_tokens(None, completions), dtype=torch.float32)
        objective, tokens = 0.0, sum(map(sum, masks))
        for ids, mask, advantage in zip(completions, masks, reward - reward.mean(), strict=True):
            inputs = torch.tensor([[*found["prompt_ids"][0], *ids]])
            logits = model(input_ids=inputs).logits[0, -len(ids) - 1 : -1]
            logp = logits.log_softmax(-1)[range(len(ids)), ids]
            objective += (logp * torch.tensor(mask)).sum() * advantage
        (-objective / tokens / len(prompts)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}])
def test_gradients_are_the_original_s_in_one_batch_or_many(sizes, toy_model_folder, tmp_path, monkeypatch):
    """The micro-batches of 2 completions are less than a problem."""
    monkeypatch.setattr(trl_rollouts, "rollouts", scripted)
    trainer = trainer_of(toy_model_folder, tmp_path, **sizes)
    prompts = trainer.train_dataset["prompt"]
    found, _ = gradients_of_a_step(trainer, monkeypatch)
    expected = reference_gradients(trainer, prompts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
def test_trl_s_losses_weigh_the_problems_otherwise(loss_type, toy_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trl_rollouts, "rollouts", scripted)
    trainer = trainer_of(toy_model_folder, tmp_path, loss_type=loss_type)
    prompts = trainer.train_dataset["prompt"]
    found, _ = gradients_of_a_step(trainer, monkeypatch)
    expected = reference_gradients(trainer, prompts)
    assert max((found[name] - gradient).abs().max() for name, gradient in expected.items()) > 1e-3


@pytest.mark.parametrize("loss_type", ["per_problem", "dapo"])
def test_the_tool_s_output_does_not_reach_the_loss(loss_type, toy_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trl_rollouts, "rollouts", scripted)
    trainer = trainer_of(toy_model_folder, tmp_path, loss_type=loss_type)
    _, (batch,) = gradients_of_a_step(trainer, monkeypatch)
    codec = trainer.engine.codec
    forced = {codec.output_start, *codec.encode("19"), codec.output_end}
    weights = batch["completion_mask"] * batch["tool_mask"]
    is_forced = torch.isin(batch["completion_ids"], torch.tensor(sorted(forced)))
    assert is_forced.any() and (weights[is_forced] == 0).all()
    assert (weights[batch["completion_mask"].bool() & ~is_forced] > 0).all()


def test_defaults_are_the_original_s():
    args = GRPOSettings(output_dir="out", bf16=False, use_cpu=True)
    wanted = {
        "loss_type": "per_problem", "scale_rewards": "none", "beta": 0.0, "num_iterations": 1, "temperature": 1.0,
        "top_k": 50, "top_p": 1.0, "num_generations": 16, "max_completion_length": 256, "max_grad_norm": 0.0,
        "num_train_epochs": 1.0, "generation_batch_size": 256,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert args.lr_scheduler_type == "linear" and args.warmup_steps == 0


@pytest.mark.parametrize("processes, passes", [("1", 32), ("4", 8), ("64", 1)])
def test_a_step_has_as_many_problems_on_any_number_of_processes(processes, passes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert passes_of_a_step(16 * 16, per_device=8) == passes


def follow_the_script():
    trl_rollouts.rollouts = scripted
    rewards.exact_answer = number_of_tokens


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_trains(toy_model_folder, tmp_path, monkeypatch):
    """The completions of a problem are on both processes."""
    sizes = {"num_generations": 4, "gradient_accumulation_steps": 4, "max_completion_length": 24, "max_steps": 2}

    def words(name, rows):
        given = sizes | {"model_name_or_path": toy_model_folder, "output_dir": tmp_path / name / "rl"}
        given |= {"train_files": write_problems(tmp_path / "problems.jsonl", 16), "per_device_train_batch_size": rows}
        given |= {"save_strategy": "no", "init_lr_fraction": 0.2, "disable_tqdm": "true"}
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]

    monkeypatch.setattr(trl_rollouts, "rollouts", scripted)
    monkeypatch.setattr(rewards, "exact_answer", number_of_tokens)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *words("alone", 4)])
    main()
    assert run(forkserver(), words("together", 2), stage="grpo", processes=2, before=follow_the_script) == 0
    alone, together = (load_file(tmp_path / name / "rl" / "model.safetensors") for name in ("alone", "together"))
    before = load_file(toy_model_folder / "model.safetensors")
    assert max((alone[name] - together[name]).abs().max() for name in alone) < 1e-5
    assert max((alone[name] - before[name]).abs().max() for name in alone) > 1e-3
