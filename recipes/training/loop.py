"""The training loop of pretraining and midtraining: Accelerate, accumulation, Muon, evaluation, log, checkpoints.

Read `train` first. Optimizer step s takes rows [s*R, (s+1)*R) of the data order for any number of processes, and a run
that was stopped, killed or moved to other machines continues with the next step.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from recipes.training.data.loader import Loader
from recipes.training.optim.fsdp import shard_model
from recipes.training.optim.hyperparameters import Plan
from recipes.training.optim.optimizer import MuonAdamW, compiles_on, muon_adamw
from recipes.training.optim.sharding import local

from .arguments import LoopArguments
from .attention import evaluation_attention
from .batch_size import accumulation_steps, explain_in_evaluation, explain_out_of_memory, is_out_of_memory
from .checkpoint.checkpoints import Checkpoint, Checkpoints, RunState, restore_random_state
from .device import convert_to_float8, evaluation_precision
from .evaluation import Evaluation
from .learning import LearningWatch
from .progress import GarbageFreezer, ProgressReport, StepTimer, TrainState
from .stage import JsonlLogger
from .stopping import StopRequest, stop_request, stopped

Batch = dict[str, torch.Tensor]
Decode = Callable[[list[int]], str | list[str]]


@dataclass(frozen=True)
class RunParts:
    """The parts of a run, whose states make a checkpoint.

    Attributes:
        module, optimizer: As returned by [`prepare`].
        loader: This process's micro-batches: `input_ids` (batch_size, max_length + 1), optionally `labels` of the same
            shape (unshifted, -100 where the loss is masked) and `position_ids` (batch_size, max_length).
        run_config: The settings that define this run.
    """

    accelerator: Accelerator
    model: NanoChatForCausalLM
    module: NanoChatForCausalLM
    optimizer: MuonAdamW
    loader: Loader
    log: JsonlLogger
    watch: LearningWatch
    run_config: dict[str, object] = field(default_factory=dict)
    train_state: TrainState = field(default_factory=TrainState)

    def save(self, checkpoints: Checkpoints) -> None:
        """Start writing a checkpoint; called by all processes together."""
        state = RunState(
            train_state=self.train_state.state_dict(),
            learning=self.watch.state_dict(),
            run_config=self.run_config,
            seconds=self.log.seconds,
            processes=self.accelerator.num_processes,
            per_device_train_batch_size=self.loader.batch_size,
        )
        shards = {"optimizer": self.optimizer.sharded_state_dict(), "data": self.loader.state_dict()}
        weights = partial(full_state_dict, self.accelerator, self.module, self.model)
        checkpoints.save(self.train_state.steps, state, shards, weights)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything but the weights, which were loaded before.

        Raises:
            UserError: The states of the data do not belong together.
        """
        state = checkpoint.state
        self.train_state.load_state_dict(state.train_state)
        self.watch.load_state_dict(state.learning)
        self.optimizer.load_sharded_state_dict(checkpoint.shards("optimizer"))
        try:
            self.loader.load_state_dict(checkpoint.shards("data"))
        except UserError as error:
            raise UserError(f"{checkpoint.folder}: {error}") from error
        restore_random_state(checkpoint, self.accelerator)


def train(
    run: RunParts,
    plan: Plan,
    args: LoopArguments,
    checkpoints: Checkpoints,
    *,
    evaluations: tuple[Evaluation, ...] = (),
    decode: Decode = str,
) -> TrainState:
    """Train `run.model` in place up to `plan.max_steps` optimizer steps, from the step that `run` was restored at.

    Args:
        decode: Turns token ids into text, to identify a batch in errors.

    Raises:
        UserError: The loss or the gradients are not finite (raised before the optimizer uses them); memory or disk is
            full.
        Stopped: On SIGTERM or Ctrl-C, after writing a checkpoint.
    """
    accelerator, module, optimizer, train_state = run.accelerator, run.module, run.optimizer, run.train_state
    batch_size, schedule, timer = run.loader.batch_size, plan.schedule(), StepTimer()
    accumulation = accumulation_steps(plan.total_batch_size, batch_size, args.max_length, accelerator.num_processes)
    report = ProgressReport(accelerator, run.model.config, plan, args, run.log, timer, train_state, run.watch)
    advice = advice_on_memory(lambda error: explain_out_of_memory(error, batch_size, args.max_length))
    with stop_request() as request, GarbageFreezer() as garbage, report, advice:
        if train_state.steps == 0:
            evaluate(evaluations, run.model, train_state, plan, report)
        timer.start()
        for step in range(train_state.steps + 1, plan.max_steps + 1):
            is_last = step == plan.max_steps
            is_saved = is_last or bool(args.save_steps and step % args.save_steps == 0)
            schedule.apply(optimizer, train_state.steps)
            batches = [next(run.loader) for _ in range(accumulation)]
            timer.lap("data")
            losses = accumulate(accelerator, module, batches)
            # Not in every step: the norm reads all gradients
            norm = gradient_norm(module) if is_saved or report.is_logged(step) else None
            being_written = checkpoints.being_written
            loss, stopping, norms, saving = all_reduce_loss(accelerator, losses, request, norm, being_written)
            timer.lap("model")
            if problem := non_finite(accelerator, train_state.steps, loss, norms, losses, batches, decode):
                checkpoints.complete()
                raise UserError(problem)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            timer.lap("optimizer")
            train_state.add_step(loss, plan.total_batch_size)
            report.step(train_state, schedule, norms)
            garbage.after_step(step)
            timer.lap("rest")
            evaluate(evaluations, run.model, train_state, plan, report)
            timer.lap("evaluation")
            if not saving:
                checkpoints.complete()
            if stopping or is_saved:
                run.save(checkpoints)
            if stopping or is_last:
                checkpoints.complete()
            timer.lap("checkpoint")
            if stopping and not is_last:
                raise stopped(request, step, plan.max_steps, checkpoints.folder)
    return report.finished(train_state)


def prepare(accelerator: Accelerator, model: NanoChatForCausalLM, plan: Plan) -> tuple[NanoChatForCausalLM, MuonAdamW]:
    """The module to train, on its device, in its precision, possibly sharded; and the optimizer over its parameters.

    Without FSDP there is no wrapper: the optimizer averages the gradients itself, once per step, each rank for its
    shard, so that backward passes never communicate.
    """
    names = ("recipe", "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "max_grad_norm")
    options = {name: getattr(plan, name) for name in names} | {"compile": compiles_on(accelerator.device)}
    model.train()  # loaded models are in evaluation mode, whose loss needs more memory
    convert_to_float8(model, accelerator)
    if accelerator.is_fsdp2:
        shard_model(model, accelerator)
        return model, muon_adamw(model, **options)
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
    count = sum(int((label != -100).sum()) for label in labels)
    trained = torch.full((), count, device=accelerator.device)  # a copy would wait for the last step's optimizer
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
    gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).float()


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
    accelerator: Accelerator,
    step: int,
    loss: float,
    norm: float | None,
    losses: torch.Tensor,
    batches: list[Batch],
    decode: Decode,
) -> str | None:
    """The error message if `loss` or `norm` is not finite, else None. Both are those of all processes."""
    if not math.isfinite(loss):
        found = gather_object(non_finite_rows(accelerator, step, losses, batches, decode))
        where = found[0] if found else "the sum over the processes overflowed"
        return (
            f"the loss is not finite at step {step} ({where}); the optimizer has not used it. Lower matrix_lr or "
            "embedding_lr, or look at that text; earlier checkpoints are good"
        )
    if norm is not None and not math.isfinite(norm):
        return (
            f"the gradients are not finite at step {step} (loss {loss:.4g}); the optimizer has not used them. Lower "
            "matrix_lr or embedding_lr; earlier checkpoints are good"
        )
    return None


def non_finite_rows(
    accelerator: Accelerator,
    step: int,
    losses: torch.Tensor,
    batches: list[Batch],
    decode: Decode,
) -> list[str]:
    """This process's micro-batches whose loss is not finite: their rows, and how their text begins."""
    found, processes, rank = [], accelerator.num_processes, accelerator.process_index
    size = len(batches[0]["input_ids"])
    for index, finite in enumerate(losses.isfinite().tolist()):
        if not finite:
            first = (step * len(batches) + index) * size * processes + rank
            rows = f"rows {first} to {first + (size - 1) * processes} of the data"
            beginning = decode(batches[index]["input_ids"][0, :32].tolist())
            found.append(f"process {rank}, {rows}, beginning {beginning!r}")
    return found


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
