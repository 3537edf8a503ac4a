import gc
import json
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

import recipes.training.evaluation
from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from recipes.pretrain import PretrainArguments
from recipes.training.arguments import LoopArguments
from recipes.training.batch_size import accumulation_steps
from recipes.training.checkpoint.checkpoints import Checkpoints
from recipes.training.data.loader import Loader
from recipes.training.data.streams import STREAMS, TextStreams
from recipes.training.evaluation import Evaluation, bits_per_byte_evaluation, validation
from recipes.training.learning import LearningWatch
from recipes.training.loop import (
    RunParts,
    accumulate,
    all_reduce_loss,
    gradient_norm,
    model_inputs,
    prepare,
    train,
)
from recipes.training.optim.hyperparameters import resolve_hyperparameters
from recipes.training.optim.overrides import Overrides
from recipes.training.setup import define
from recipes.training.stage import JsonlLogger, OutputArguments
from recipes.training.stopping import Stopped, stop_request


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
    module = accelerator.prepare_model(model, evaluation_mode=True)
    mine = uneven_batches()[accelerator.process_index :: accelerator.num_processes]
    loss = accelerator.reduce(accumulate(accelerator, module, mine).sum(), "sum").item()
    # each process keeps its own gradient; the optimizer averages them
    grads = accelerator.reduce([p.grad for p in model.parameters()], "mean")
    if accelerator.is_main_process:
        torch.save({"loss": loss, "grads": grads}, path)
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


def two_processes() -> Accelerator:
    """In a process that `debug_launcher` has forked from one that already had an accelerator of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def step_gradients_of_two(path):
    two_processes()
    step_gradients(path)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    step_gradients(tmp_path / "one.pt")
    debug_launcher(step_gradients_of_two, args=(tmp_path / "two.pt",), num_processes=2)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    for a, b in zip(one["grads"], two["grads"], strict=True):
        assert (a - b).abs().max() < 1e-6


def loop_arguments(**more):
    usual = {"per_device_train_batch_size": 2, "eval_steps": 5, "logging_steps": 5, "save_steps": 0}
    return LoopArguments(max_length=16, **usual | more)


def plan_of(model, max_steps, **more):
    rates = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008, "warmup_steps": 2, "momentum_steps": 5}
    overrides = Overrides(max_steps=max_steps, total_batch_size=64, **rates | more)
    return resolve_hyperparameters(model.config, "current", overrides, max_length=16)


def rows(count, seed=0):
    """A tiny language: each token is followed by the next one."""
    starts = torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))
    ids = (starts[:, None] + torch.arange(17)) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


class EndlessBatches:
    """What the loop asks of a loader, without data files behind it."""

    batch_size = 2

    def __init__(self, some):
        self.some, self.taken = some, 0

    def __next__(self):
        first = self.taken * self.batch_size % len(self.some)
        self.taken += 1
        return {"input_ids": torch.stack([row["input_ids"] for row in self.some[first : first + self.batch_size]])}

    def state_dict(self):
        return {"taken": torch.tensor(self.taken)}


def run(tmp_path, name, tokenizer, *, some=None, model=None, max_steps=20, request=None, evaluations=None, **more):
    accelerator = Accelerator(cpu=True)
    model, args = model or small_model(), loop_arguments(**more)
    plan, log = plan_of(model, max_steps), JsonlLogger(tmp_path / name)
    module, optimizer = prepare(accelerator, model, plan)
    if evaluations is None:
        measure = validation(accelerator, rows(8, seed=5), tokenizer, 8)
        evaluations = (bits_per_byte_evaluation(measure, args.eval_steps),)
    checkpoints = Checkpoints(tmp_path / "checkpoints" / name, accelerator)
    loader, watch = EndlessBatches(some or rows(64)), LearningWatch("base", max_steps)
    parts = RunParts(accelerator, model, module, optimizer, loader, log, watch)
    progress = train(parts, plan, args, checkpoints, evaluations=evaluations, decode=str)
    return model, progress


def test_training_learns_and_repeats_itself_exactly(tmp_path, toy_model_and_tokenizer):
    tokenizer = toy_model_and_tokenizer[1]
    model, progress = run(tmp_path, "a", tokenizer)
    again, _ = run(tmp_path, "b", tokenizer)
    assert progress.steps == 20 and progress.tokens == 20 * 64 and progress.loss < 2.0
    assert progress.tokens_per_second > 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert model.training and gc.isenabled() and gc.get_freeze_count() == 0
    logged = [json.loads(line) for line in (tmp_path / "logs" / "a.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "bits_per_byte" in row] == [0, 5, 10, 15, 20]
    steps = [row for row in logged if "loss" in row]
    assert [row["step"] for row in steps] == [1, 5, 10, 15, 20]
    parts = ("seconds_data", "seconds_model", "seconds_optimizer", "seconds_rest")
    assert all(row["seconds_training"] == pytest.approx(sum(row[part] for part in parts), abs=1e-5) for row in steps)


def test_garbage_is_frozen_while_training(tmp_path, toy_model_and_tokenizer):
    seen = []
    watch = Evaluation(1, lambda model: (seen.append((gc.isenabled(), gc.get_freeze_count() > 0)), ({}, []))[1])
    run(tmp_path, "a", toy_model_and_tokenizer[1], max_steps=3, evaluations=(watch,))
    assert seen == [(False, True)] * 3
    assert gc.isenabled()


def test_evaluations_have_their_intervals_and_see_a_model_at_rest(tmp_path, toy_model_and_tokenizer):
    seen = []

    def look(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"value": len(seen)}, ["a line"]

    run(tmp_path, "a", toy_model_and_tokenizer[1], max_steps=10, evaluations=(Evaluation(4, look),))
    assert seen == [(False, False)] * 3
    logged = [json.loads(line) for line in (tmp_path / "logs" / "a.jsonl").read_text().splitlines()]
    assert [(row["step"], row["value"]) for row in logged if "value" in row] == [(4, 1), (8, 2), (10, 3)]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_names_the_batch(tmp_path, toy_model_and_tokenizer):
    model = small_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = math.nan
    some = rows(64)
    for row in some[:42]:
        row["input_ids"] = row["input_ids"] % 63  # the poisoned token comes first in row 42, in step 10
    some[42]["input_ids"] = torch.arange(60, 77) % 64
    before = {}

    def keep(model):
        before.update({name: p.clone() for name, p in model.named_parameters()})
        return {}, []

    with pytest.raises(
        UserError, match=r"step 10 \(process 0, rows 42 to 43 of the data, beginning '\[60, 61, 62, 63"
    ) as error:
        run(tmp_path, "c", toy_model_and_tokenizer[1], some=some, model=model, evaluations=(Evaluation(1, keep),))
    assert "optimizer has not used it" in str(error.value)
    for name, p in model.named_parameters():
        assert torch.equal(torch.nan_to_num(p), torch.nan_to_num(before[name])), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stop_before_the_optimizer(tmp_path, toy_model_and_tokenizer, bad):
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    model.lm_head.weight.register_hook(lambda gradient: gradient * bad)
    with pytest.raises(UserError, match=r"the gradients are not finite at step 0 \(loss 4\.\d+\)"):
        run(tmp_path, "c", toy_model_and_tokenizer[1], model=model, evaluations=())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_stage_whose_gradients_are_all_zero_says_so(tmp_path, toy_model_and_tokenizer, capsys):
    model = small_model()
    for p in model.parameters():
        p.register_hook(torch.zeros_like)
    _, progress = run(tmp_path, "c", toy_model_and_tokenizer[1], model=model, evaluations=())
    assert progress.warnings[0].startswith("all gradients were zero from step 1 to step 20")
    assert "warning: all gradients were zero from step 1 to step 10" in capsys.readouterr().out
    assert run(tmp_path, "d", toy_model_and_tokenizer[1], evaluations=())[1].warnings == []


def test_one_process_with_a_gradient_is_enough(tmp_path):
    debug_launcher(gradients_of_one, args=(tmp_path / "norms.pt",), num_processes=2)
    norms = torch.load(tmp_path / "norms.pt", weights_only=True)
    assert norms == [0.0, pytest.approx(5.0)]


def gradients_of_one(path):
    """What the processes agree on when none has gradients that are not zero, and when the last one has."""
    accelerator, module, norms = two_processes(), torch.nn.Linear(2, 1, bias=False), []
    for gradient in ([0.0, 0.0], [3.0, 4.0]):
        mine = torch.tensor([gradient]) * accelerator.process_index
        module.weight.grad = mine
        with stop_request() as request:
            norms.append(all_reduce_loss(accelerator, torch.ones(1), request, gradient_norm(module))[2])
    if accelerator.is_main_process:
        torch.save(norms, path)
    accelerator.wait_for_everyone()


def test_neither_the_log_nor_a_tracker_ends_the_training(tmp_path, toy_model_and_tokenizer, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(Accelerator, "log", fail)
    (tmp_path / "logs").write_text("no folder")
    _, progress = run(tmp_path, "a", toy_model_and_tokenizer[1], report_to="trackio")
    assert progress.steps == 20
    said = capsys.readouterr()
    assert said.out.count("warning: report_to trackio failed (no network); training goes on without it") == 1
    assert said.err.count("a.jsonl cannot be written") == 1


def test_running_out_of_memory_says_what_to_lower(tmp_path, toy_model_and_tokenizer):
    model = small_model()

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.forward = forward
    with pytest.raises(UserError, match="set per_device_train_batch_size to 1"):
        run(tmp_path, "d", toy_model_and_tokenizer[1], model=model, evaluations=())


def test_running_out_of_memory_in_an_evaluation_names_what_helps_there(tmp_path, toy_model_and_tokenizer):
    def measure(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(UserError, match="in the evaluation after step 2.*lower max_length.*allocate 2 GiB") as error:
        run(tmp_path, "d", toy_model_and_tokenizer[1], evaluations=(Evaluation(2, measure),))
    assert "per_device_train_batch_size" not in str(error.value)


def test_a_checkpoint_that_was_written_counts_although_the_next_step_fails(tmp_path, toy_model_and_tokenizer):
    model = small_model()

    def spoil(model):
        model.lm_head.weight.data[0] = math.nan
        return {}, []

    with pytest.raises(UserError, match="not finite at step 3"):
        run(tmp_path, "c", toy_model_and_tokenizer[1], model=model, evaluations=(Evaluation(3, spoil),), save_steps=2)
    assert Checkpoints(tmp_path / "checkpoints" / "c", Accelerator(cpu=True)).find("auto").step == 2


def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, toy_model_and_tokenizer):
    handler = signal.getsignal(signal.SIGTERM)
    ask = Evaluation(3, lambda model: (signal.raise_signal(signal.SIGTERM), ({}, []))[1])
    with pytest.raises(Stopped, match="SIGTERM received: stopped after step 4 of 20.*--resume auto goes on"):
        run(tmp_path, "e", toy_model_and_tokenizer[1], evaluations=(ask,))
    assert Checkpoints(tmp_path / "checkpoints" / "e", Accelerator(cpu=True)).find("auto").step == 4
    assert signal.getsignal(signal.SIGTERM) is handler


def test_data_states_that_do_not_fit_are_refused_with_the_checkpoint_they_are_from(tmp_path, monkeypatch):
    accelerator, model = Accelerator(cpu=True), small_model()
    module, optimizer = prepare(accelerator, model, plan_of(model, 4))
    loader, watch = Loader(TextStreams(None, None, max_length=16), batch_size=2), LearningWatch("base", 4)
    parts = RunParts(accelerator, model, module, optimizer, loader, JsonlLogger(tmp_path / "f"), watch)
    parts.train_state.add_step(1.0, tokens=64)
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "f", accelerator)
    parts.save(checkpoints)
    checkpoints.complete()
    monkeypatch.setattr("recipes.training.data.loader.STREAMS", STREAMS + 1)
    with pytest.raises(UserError, match="step-00000001: made by a version with other data streams; resume with that"):
        parts.restore(checkpoints.find("auto"))


def test_a_batch_that_does_not_divide_is_refused():
    assert accumulation_steps(64, batch_size=2, max_length=16, world_size=2) == 1
    with pytest.raises(UserError, match="multiple of 96"):
        accumulation_steps(64, batch_size=2, max_length=16, world_size=3)


def test_of_long_rows_fewer_go_through_the_model_at_once(toy_model_and_tokenizer, monkeypatch):
    monkeypatch.setattr(recipes.training.evaluation, "MAX_TOKENS", 50)
    model, seen = small_model().eval(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    measured = validation(Accelerator(cpu=True), rows(8), toy_model_and_tokenizer[1], 8)(model)
    assert set(seen) <= {(3, 16), (2, 16)} and math.isfinite(measured)


def test_validation_needs_a_row(toy_model_and_tokenizer):
    with pytest.raises(UserError, match="does not fill one row"):
        validation(Accelerator(cpu=True), [], toy_model_and_tokenizer[1], 8)


def test_a_loaded_model_is_trained_in_training_mode():
    model = small_model().eval()
    module, _ = prepare(Accelerator(cpu=True), model, plan_of(model, 2))
    assert module.training


def test_every_pass_computes_in_the_precision_asked_for():
    """Also where Accelerate has not wrapped the model's forward, as under FSDP2."""
    accelerator, model, seen = Accelerator(cpu=True), small_model(), []
    accelerator.state._mixed_precision = "bf16"
    accelerator.native_amp = True
    try:
        model.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        accumulate(accelerator, model, uneven_batches()[:3])
    finally:
        accelerator.state._mixed_precision = "no"
    assert len(seen) >= 3 and all(seen)


class Copies(TorchDispatchMode):
    """Whether the source of each copy to another device was contiguous; a slice goes through pageable memory."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.contiguous.append(args[0].is_contiguous())
            assert kwargs["non_blocking"]
        return function(*args, **kwargs or {})


def test_batches_travel_as_whole_rows():
    batch = uneven_batches()[1] | {"position_ids": torch.arange(16).repeat(2, 1)}
    with Copies() as copies:
        inputs = model_inputs(batch, torch.device("meta"))
    assert copies.contiguous == [True] * 3
    assert all(value.shape == (2, 16) and value.is_contiguous() for value in inputs.values())
    here = model_inputs(batch, torch.device("cpu"))
    assert torch.equal(here["input_ids"], batch["input_ids"][:, :-1])
    assert torch.equal(here["shift_labels"], batch["labels"][:, 1:])
    del batch["labels"]
    assert torch.equal(model_inputs(batch, torch.device("cpu"))["shift_labels"], batch["input_ids"][:, 1:])


def test_only_a_late_second_ctrl_c_does_not_wait(monkeypatch):
    with stop_request() as request:
        for _ in range(2):  # from the terminal, and once more from torchrun
            signal.raise_signal(signal.SIGINT)
        assert request.reason == "SIGINT received"
        monkeypatch.setattr("recipes.training.stopping.time.monotonic", lambda: request.noted_at + 3)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_process_whose_launcher_has_ended_stops():
    with stop_request() as request:
        assert request.launcher is None and request.reason is None
        request.launcher = os.getppid()
        assert request.reason is None
        request.launcher = -1
        assert request.reason == "the launcher has ended"


def test_a_moved_run_is_the_same_run_and_another_one_is_not():
    def of(folder, **more):
        own = {"tokenizer": f"{folder}/tokenizer", "train_files": [f"{folder}/a.parquet"], "val_files": ["v.txt"]}
        return define(PretrainArguments(**own | more), LoopArguments(), OutputArguments(f"{folder}/base"))

    assert of("runs/a") == of("elsewhere", val_files=["w.txt"], eval_tokens=7)
    assert of("runs/a") != of("runs/a", train_files=["runs/a/b.parquet"])
    assert of("runs/a") != of("runs/a", depth=6)
