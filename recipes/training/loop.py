"""The training loop of pretraining and midtraining: Accelerate, accumulation, Muon, evaluation, log, checkpoints.

Read `train` first. Optimizer step s takes rows [s*R, (s+1)*R) of the data order for any number of processes, and a run
that was stopped, killed or moved to other machines continues with the next step.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modeling_nanochat.errors import UserError
from recipes.training.data.loader import Loader
from recipes.training.optim.fsdp import shard_model
from recipes.training.optim.hyperparameters import Plan
from recipes.training.optim.optimizer import MuonAdamW, compiles_on, muon_adamw

from .arguments import LoopArguments
from .attention import evaluation_attention
from .batch_size import explain_in_evaluation, explain_out_of_memory, is_out_of_memory
from .checkpoint import Checkpoint, Checkpoints, RunState, restore_random_state
from .device import convert_to_float8, evaluation_precision
from .evaluation import Evaluation
from .learning import LearningWatch
from .progress import GarbageFreezer, ProgressReport, StepTimer, TrainState
from .stage import JsonlLogger
from .stopping import Stopped, StopRequest, stop_request

Batch = dict[str, torch.Tensor]


def accumulation_steps(total_batch_size: int, batch_size: int, max_length: int, world_size: int) -> int:
    """Forward passes per optimizer step.

    Raises:
        UserError: `total_batch_size` is not a whole number of passes.
    """
    tokens = batch_size * max_length * world_size
    if total_batch_size % tokens:
        raise UserError(
            f"total_batch_size {total_batch_size} must be a multiple of {tokens} (per_device_train_batch_size "
            f"{batch_size} x max_length {max_length} x {world_size} processes)"
        )
    return total_batch_size // tokens


def train(
    accelerator: Accelerator,
    model: PreTrainedModel,
    module: torch.nn.Module,
    optimizer: MuonAdamW,
    loader: Loader,
    plan: Plan,
    args: LoopArguments,
    log: JsonlLogger,
    checkpoints: Checkpoints,
    *,
    resume_from: Checkpoint | None = None,
    run_config: dict[str, object] | None = None,
    evaluations: tuple[Evaluation, ...] = (),
    decode: Callable[[list[int]], str] = str,
    stage: str = "base",
) -> TrainState:
    """Train `model` in place up to `plan.max_steps` optimizer steps.

    Args:
        module, optimizer: As returned by [`prepare`], with the weights of `resume_from` already loaded.
        loader: This process's micro-batches: `input_ids` (batch_size, max_length + 1), optionally `labels` of the same
            shape (unshifted, -100 where the loss is masked) and `position_ids` (batch_size, max_length).
        resume_from: The checkpoint to continue from.
        run_config: The settings that define this run; stored in the checkpoints.
        decode: Turns token ids into text, to identify a batch in errors.
        stage: base or mid.

    Raises:
        UserError: The loss or the gradients are not finite (raised before the optimizer uses them); memory or disk is
            full.
        Stopped: On SIGTERM or Ctrl-C, after writing a checkpoint.
    """
    watch = LearningWatch(stage, plan.max_steps)
    train_state = TrainState()
    if resume_from:
        restore(resume_from, train_state, optimizer, loader, watch, accelerator)
    batch_size, processes = loader.batch_size, accelerator.num_processes
    accumulation = accumulation_steps(plan.total_batch_size, batch_size, args.max_length, processes)
    schedule, timer = plan.schedule(), StepTimer()
    report = ProgressReport(accelerator, model.config, plan, args, log, timer, train_state, watch)

    def fail(problem: str) -> NoReturn:
        """Raise `UserError`; called on all processes together."""
        checkpoints.complete()
        raise UserError(problem)

    def is_saved(step: int) -> bool:
        return step == plan.max_steps or bool(args.save_steps and step % args.save_steps == 0)

    def save() -> None:
        progress = {"train_state": train_state.state_dict(), "learning": watch.state_dict(), "seconds": log.seconds}
        state = RunState(
            **progress, run_config=run_config or {}, processes=processes, per_device_train_batch_size=batch_size
        )
        shards = {"optimizer": optimizer.sharded_state_dict(), "data": loader.state_dict()}
        checkpoints.save(train_state.steps, state, shards, lambda: full_state_dict(accelerator, module, model))

    advice = advice_on_memory(lambda error: explain_out_of_memory(error, batch_size, args.max_length))
    with stop_request() as request, GarbageFreezer() as garbage, report, advice:
        if train_state.steps == 0:
            evaluate(evaluations, model, train_state, plan, report)
        timer.start()
        while train_state.steps < plan.max_steps:
            schedule.apply(optimizer, train_state.steps)
            batches = [next(loader) for _ in range(accumulation)]
            timer.lap("data")
            losses = accumulate(accelerator, module, batches)
            step = train_state.steps + 1
            is_measured = report.is_logged(step) or is_saved(step)  # not in every step: it reads all gradients
            norm = gradient_norm(module) if is_measured else None
            being_written = checkpoints.being_written
            loss, stopping, norms, saving = all_reduce_loss(accelerator, losses, request, norm, being_written)
            timer.lap("model")
            if not math.isfinite(loss):
                first_row = train_state.steps * (plan.total_batch_size // args.max_length)
                fail(non_finite(accelerator, losses, batches, train_state.steps, first_row, decode))
            if norms is not None and not math.isfinite(norms):
                fail(
                    f"the gradients are not finite at step {train_state.steps} (loss {loss:.4g}); the optimizer has "
                    "not used them. Lower matrix_lr or embedding_lr; earlier checkpoints are good"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            timer.lap("optimizer")
            train_state.add_step(loss, plan.total_batch_size)
            report.step(train_state, schedule, norms)
            garbage.after_step(train_state.steps)
            timer.lap("rest")
            evaluate(evaluations, model, train_state, plan, report)
            timer.lap("evaluation")
            if not saving:
                checkpoints.complete()
            if stopping or is_saved(train_state.steps):
                save()
            if stopping or train_state.steps == plan.max_steps:
                checkpoints.complete()
            timer.lap("checkpoint")
            if stopping and train_state.steps < plan.max_steps:
                raise Stopped(
                    f"{request.reason or 'another process was asked to stop'}: stopped after step {train_state.steps} "
                    f"of {plan.max_steps}, checkpoint in {checkpoints.folder}; "
                    "the same command with --resume auto goes on"
                )
    return report.finished(train_state)


def prepare(accelerator: Accelerator, model: PreTrainedModel, plan: Plan) -> tuple[torch.nn.Module, MuonAdamW]:
    """The module to train, on its device, in its precision, possibly sharded; and the optimizer over its parameters.

    Without FSDP there is no wrapper: the optimizer averages the gradients itself, once per step, each rank for its
    shard, so that backward passes never communicate.
    """
    names = ("recipe", "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "max_grad_norm")
    options = {name: getattr(plan, name) for name in names} | {"compile": compiles_on(accelerator.device)}
    model.train()  # loaded models are in evaluation mode, whose loss needs more memory
    convert_to_float8(model, accelerator)
    if accelerator.is_fsdp2:
        module = shard_model(model, accelerator)
        return module, muon_adamw(module, **options)
    module = accelerator.prepare_model(model, evaluation_mode=True)
    group = None
    if accelerator.num_processes > 1:
        group = dist.group.WORLD
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)
    return module, muon_adamw(model, **options, process_group=group)


@contextmanager
def advice_on_memory(explain: Callable[[BaseException], UserError]) -> Iterator[None]:
    """Replace out-of-memory errors by the error from `explain`, which says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain(error) from error


def restore(
    checkpoint: Checkpoint,
    train_state: TrainState,
    optimizer: MuonAdamW,
    loader: Loader,
    watch: LearningWatch,
    accelerator: Accelerator,
) -> None:
    """Restore everything but the weights, which were loaded before.

    Raises:
        UserError: The states of the data do not belong together.
    """
    train_state.load_state_dict(checkpoint.state.train_state)
    watch.load_state_dict(checkpoint.state.learning)
    optimizer.load_sharded_state_dict(checkpoint.shards("optimizer"))
    try:
        loader.load_state_dict(checkpoint.shards("data"))
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from error
    restore_random_state(checkpoint, accelerator)


def full_state_dict(
    accelerator: Accelerator, module: torch.nn.Module, model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """All weights under their ordinary names, unsharded, at least on the main process."""
    return accelerator.get_state_dict(module) if accelerator.is_fsdp2 else model.state_dict()


def accumulate(accelerator: Accelerator, module: torch.nn.Module, micro_batches: list[Batch]) -> torch.Tensor:
    """Compute gradients of the mean loss over all trained tokens of the step, on all processes.

    Returns:
        FloatTensor (micro-batches,): the contributions of this process's micro-batches to that mean. Gradients stay
        local and are scaled by the number of processes: their mean over processes is the gradient of the loss.
    """
    labels = [batch.get("labels", batch["input_ids"])[:, 1:] for batch in micro_batches]
    trained = sum(int((label != -100).sum()) for label in labels)
    trained = torch.full((), trained, device=accelerator.device)  # a copy would wait for the last step's optimizer
    trained = accelerator.reduce(trained, "sum").clamp(min=1)
    losses = []
    for number, batch in enumerate(micro_batches, start=1):
        inputs = model_inputs(batch, accelerator.device)
        # FSDP reduces gradients once per step, in the last pass
        with accelerator.no_sync(module) if number < len(micro_batches) else nullcontext():
            with accelerator.autocast():
                loss = module(**inputs, use_cache=False, num_items_in_batch=trained).loss
            accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
    return torch.stack(losses)


def model_inputs(batch: Batch, device: torch.device) -> Batch:
    """Inputs and targets on `device`, (batch_size, max_length) each.

    Rows are copied first and sliced on the device: a slice is not contiguous, and its copy would block.
    """
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    ids = batch["input_ids"]
    inputs = {"input_ids": ids[:, :-1].contiguous(), "shift_labels": batch.get("labels", ids)[:, 1:].contiguous()}
    return inputs | ({"position_ids": batch["position_ids"]} if "position_ids" in batch else {})


def gradient_norm(module: torch.nn.Module) -> torch.Tensor:
    """The norm of this process's local gradients, a 0-d tensor: 0 only if all are 0, inf or nan if any is.

    It is taken before averaging, so it tells no more than that; it costs one read of the gradients.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return torch.nn.utils.get_total_norm(local).float()


def all_reduce_loss(
    accelerator: Accelerator,
    losses: torch.Tensor,
    request: StopRequest,
    norm: torch.Tensor | None,
    saving: bool = False,
) -> tuple[float, bool, float | None, bool]:
    """The loss over all processes, whether any was asked to stop, the sum of their norms, whether any is still saving.

    All in one all-reduce and one device synchronization.
    """
    values = [losses.sum(), *losses.new_tensor([float(request.reason is not None), float(saving)])]
    values += [] if norm is None else [norm.to(losses)]
    loss, stops, savings, *norms = accelerator.reduce(torch.stack(values), "sum").tolist()
    return loss, stops > 0, norms[0] if norms else None, savings > 0


def non_finite(
    accelerator: Accelerator, losses: torch.Tensor, batches: list[Batch], step: int, first_row: int, decode: Callable
) -> str:
    """The error message for a loss that is not finite: which rows of which process, and how their text begins."""
    found = []
    for index, finite in enumerate(losses.isfinite().tolist()):
        if not finite:
            size = len(batches[index]["input_ids"])
            first = first_row + index * size * accelerator.num_processes + accelerator.process_index
            last = first + (size - 1) * accelerator.num_processes
            beginning = decode(batches[index]["input_ids"][0, :32].tolist())
            rows = f"rows {first} to {last} of the data"
            found.append(f"process {accelerator.process_index}, {rows}, beginning {beginning!r}")
    found = gather_object(found) or ["the sum over the processes overflowed"]
    return (
        f"the loss is not finite at step {step} ({found[0]}); the optimizer has not used it. Lower matrix_lr or "
        "embedding_lr, or look at that text; earlier checkpoints are good"
    )


def evaluate(
    evaluations: tuple[Evaluation, ...],
    model: PreTrainedModel,
    train_state: TrainState,
    plan: Plan,
    report: ProgressReport,
) -> None:
    """Run the evaluations that are due, on the uncompiled model, without gradients."""
    due = [evaluation for evaluation in evaluations if evaluation.due(train_state.steps, plan.max_steps)]
    if not due:
        return
    model.eval()
    with (
        advice_on_memory(lambda error: explain_in_evaluation(error, train_state.steps)),
        torch.no_grad(),
        evaluation_precision(model),
        evaluation_attention(model),
        report.accelerator.autocast(),
    ):
        for evaluation in due:
            report.evaluated(train_state, *evaluation.run(model))
    model.train()
