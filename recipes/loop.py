"""The training loop of pretraining and midtraining: Accelerate, gradient accumulation, schedule, evaluation, log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_nanochat.errors import UserError

from .optimizer import muon_adamw
from .schedule import Schedule
from .stage import StageLog, beside

Batch = dict[str, torch.Tensor]


@dataclass
class LoopArguments:
    """What pretraining and midtraining have in common."""

    max_length: int = field(default=2048, metadata={"help": "Tokens in a row."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows in one forward pass of one device."})
    total_batch_size: int = field(
        default=524288, metadata={"help": "Tokens per optimizer step, over all devices and accumulated passes."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; -1 derives them."})
    matrix_lr: float = field(default=0.02, metadata={"help": "Muon's learning rate."})
    embedding_lr: float = field(default=0.3, metadata={"help": "AdamW's rate of the embedding, at width 768."})
    unembedding_lr: float = field(default=0.008, metadata={"help": "AdamW's rate of the head, at width 768."})
    weight_decay: float = field(default=0.0, metadata={"help": "Muon's weight decay at the first step."})
    warmup_steps: int = field(default=40, metadata={"help": "Steps of rising learning rate."})
    warmdown_ratio: float = field(default=0.65, metadata={"help": "Share of the steps with falling learning rate."})
    final_lr_fraction: float = field(default=0.05, metadata={"help": "Learning rate at the end, relative."})
    momentum_steps: int = field(default=400, metadata={"help": "Steps until Muon's momentum is at its highest."})
    eval_steps: int = field(default=250, metadata={"help": "Steps between validations; the last step always has one."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two entries of the log."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that tokenize and pack beside training."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model; needs a C++ compiler or CUDA."})
    report_to: str = field(default="none", metadata={"help": "none, or trackio, tensorboard, wandb."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and data order."})


@dataclass
class Progress:
    """Where a finished run got to."""

    steps: int
    tokens: int
    loss: float
    tokens_per_second: float


def accumulation_steps(args: LoopArguments, world_size: int) -> int:
    """Forward passes per optimizer step.

    Raises:
        UserError: `total_batch_size` is not a whole number of passes.
    """
    tokens = args.per_device_train_batch_size * args.max_length * world_size
    if args.total_batch_size % tokens:
        raise UserError(
            f"total_batch_size {args.total_batch_size} must be a multiple of {tokens} (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x max_length {args.max_length} x {world_size} processes)"
        )
    return args.total_batch_size // tokens


def make_accelerator(args: LoopArguments, output_dir: str) -> Accelerator:
    """Accelerate, with the tracker asked for; the tracker's files go beside the model folder.

    Raises:
        UserError: The tracker is unknown or not installed.
    """
    if args.report_to == "none":
        accelerator = Accelerator()
    else:
        try:
            accelerator = Accelerator(log_with=args.report_to, project_dir=beside(output_dir, "trackers", ""))
        except ValueError as error:
            raise UserError(f"report_to {args.report_to}: {str(error).splitlines()[0]}") from error
        if not accelerator.log_with:
            raise UserError(f"report_to {args.report_to}: not installed; pip install {args.report_to}")
        accelerator.init_trackers(f"nanochat-{Path(output_dir).name}", config=vars(args))
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates itself, by total_batch_size
    return accelerator


def train(
    accelerator: Accelerator,
    model: PreTrainedModel,
    batches: Iterator[Batch],
    args: LoopArguments,
    evaluate: Callable[[PreTrainedModel], float] | None,
    log: StageLog,
) -> Progress:
    """Train `model` in place for `args.max_steps` optimizer steps.

    Args:
        batches: This process's micro-batches: `input_ids` and `labels`, LongTensor
            (per_device_train_batch_size, max_length + 1), labels unshifted.
        evaluate: Bits per byte of the unwrapped model; called by every process.

    Raises:
        UserError: The loss is not finite; raised before the optimizer would have used it.
    """
    accumulation = accumulation_steps(args, accelerator.num_processes)
    rates = {"matrix_lr": args.matrix_lr, "embedding_lr": args.embedding_lr, "unembedding_lr": args.unembedding_lr}
    optimizer = muon_adamw(model, **rates, weight_decay=args.weight_decay)
    schedule = Schedule(
        args.max_steps, args.warmup_steps, args.warmdown_ratio, args.final_lr_fraction, args.momentum_steps
    )
    module, optimizer = accelerator.prepare(torch.compile(model) if args.torch_compile else model, optimizer)
    progress = Progress(0, 0, math.nan, 0.0)
    bar = tqdm(total=args.max_steps, unit="step", disable=not accelerator.is_main_process, mininterval=0.5)
    validate(progress, evaluate, model, accelerator, log, bar)
    for step in range(args.max_steps):
        started = time.perf_counter()
        schedule.apply(optimizer, step)
        loss = accumulate(accelerator, module, [next(batches) for _ in range(accumulation)])
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}; nothing was saved. Lower matrix_lr or embedding_lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        progress = Progress(
            step + 1, progress.tokens + args.total_batch_size, loss, args.total_batch_size / max(seconds, 1e-9)
        )
        report(progress, schedule, args, accelerator, log, bar)
        if (step + 1) % args.eval_steps == 0 or step + 1 == args.max_steps:
            validate(progress, evaluate, model, accelerator, log, bar)
    bar.close()
    return progress


def accumulate(accelerator: Accelerator, module: torch.nn.Module, micro_batches: list[Batch]) -> float:
    """Gradients of the mean loss over every learnt token of the step, on all processes; returns that loss."""
    targets = [batch["labels"][:, 1:] for batch in micro_batches]
    learnt = torch.tensor(sum(int((t != -100).sum()) for t in targets), device=accelerator.device)
    learnt = accelerator.reduce(learnt, "sum").clamp(min=1)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, start=1):
        ids = batch["input_ids"][:, :-1].to(accelerator.device, non_blocking=True)
        labels = batch["labels"][:, 1:].to(accelerator.device, non_blocking=True).contiguous()
        # gradients travel between processes once per step, with the last pass
        with nullcontext() if number == len(micro_batches) else accelerator.no_sync(module):
            loss = module(input_ids=ids, shift_labels=labels, use_cache=False, num_items_in_batch=learnt).loss
            # DDP averages over processes, the loss is a share of the sum over all of them
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return accelerator.reduce(total, "sum").item()


def validate(progress: Progress, evaluate, model, accelerator: Accelerator, log: StageLog, bar: tqdm) -> None:
    if evaluate is None:
        return
    model.eval()
    with accelerator.autocast():
        bits_per_byte = evaluate(model)
    model.train()
    log.log(step=progress.steps, tokens=progress.tokens, bits_per_byte=bits_per_byte)
    accelerator.log({"val/bits_per_byte": bits_per_byte}, step=progress.steps)
    if accelerator.is_main_process:
        bar.write(f"step {progress.steps}: validation {bits_per_byte:.4f} bits per byte")


def report(
    progress: Progress, schedule: Schedule, args: LoopArguments, accelerator: Accelerator, log: StageLog, bar: tqdm
) -> None:
    bar.update()
    bar.set_postfix_str(f"loss {progress.loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s", refresh=False)
    if progress.steps % args.logging_steps == 0 or progress.steps in (1, args.max_steps):
        values = {
            "loss": progress.loss,
            "tokens_per_second": round(progress.tokens_per_second),
            "learning_rate_multiplier": schedule.learning_rate_multiplier(progress.steps - 1),
        }
        log.log(step=progress.steps, tokens=progress.tokens, **values)
        accelerator.log({f"train/{key}": value for key, value in values.items()}, step=progress.steps)
