"""How many rows go through the model in one pass: the largest number that fits, determined automatically.

Gradient accumulation makes up the rest of `total_batch_size`, so the number changes speed and memory, not the
training: it divides the rows of a process. Accelerate's `find_executable_batch_size` is not suitable: it lowers the
batch by a tenth at a time, which is rarely a divisor, and each process would choose its own.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import LOSS_BYTES_PER_LOGIT, saved_bytes_per_token
from modeling_nanochat.softcapped_loss import chunk_logits
from recipes.training.optim.fsdp import forget_failed_pass
from recipes.training.optim.sharding import local

# Tokens per pass beyond which throughput no longer rises. On a CPU 4,096 were fastest, at widths 128 and 384; 32,768
# took twice as long per token, because activations no longer fit the caches. The original uses 65,536 on 80 GB GPUs.
CPU_TOKENS = 2**12
ACCELERATOR_TOKENS = 2**17
SHARE_OF_MEMORY = 0.5  # of free memory, where usage can only be estimated
COMPILED_SHARE = 0.85  # of an uncompiled pass's memory; measured 0.83 for plain, 0.88 for turbo


def find_batch_size(
    model: NanoChatForCausalLM,
    max_length: int,
    rows_per_process: int,
    device: torch.device,
    trial: Callable[[int], None],
    agree: Callable[[int], int] = int,
    *,
    state_bytes: int = 0,
    compiled: bool = False,
    most_rows: int | None = None,
) -> int:
    """The largest divisor of `rows_per_process` whose pass fits into the memory of every process.

    On CUDA by trial, with the optimizer's state already allocated; elsewhere, where running out of memory stops the
    machine rather than the process, by an estimate.

    Args:
        model: The model to train, on its device.
        max_length: Tokens per row.
        rows_per_process: Rows of a process in one optimizer step.
        trial: Runs one forward and backward pass with this many rows, as in training. On CUDA only.
        agree: Returns the smallest of the numbers that the processes pass, on every process; see [`smallest`].
        state_bytes: Size of the optimizer's state in this process; on a CPU, zeros take no memory until written.
        compiled: Whether the trial's pass is compiled.
        most_rows: The result is at most this.

    Raises:
        UserError: Not even one row fits.
    """
    limit = max(1, (CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS) // max_length)
    limit = min(limit, most_rows or limit)
    sizes = [rows for rows in divisors(rows_per_process) if rows <= limit]
    if device.type != "cuda":
        budget = memory_for_activations(model, state_bytes)
        fitting = [rows for rows in sizes if activation_bytes(model.config, max_length, rows, device) <= budget]
        return agree(max(fitting, default=1))
    trials = Trials(model, max_length, device, trial, agree)
    if found := trials.first_that_fits(trials.worth_compiling(sizes) if compiled else sizes):
        return found
    raise explain_out_of_memory(trials.error or "another process is out of memory", 1, max_length)


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


def divisors(number: int) -> list[int]:
    """All divisors, from the largest to 1."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


class Trials:
    """Passes with decreasing numbers of rows. All processes try the same numbers: a pass may need all of them."""

    def __init__(
        self,
        model: nn.Module,
        max_length: int,
        device: torch.device,
        trial: Callable[[int], None],
        agree: Callable[[int], int],
    ):
        self.model, self.max_length, self.device, self.trial, self.agree = model, max_length, device, trial, agree
        # Of the last pass
        self.error: str | None = None
        self.peak = 0  # bytes

    def first_that_fits(self, sizes: Sequence[int]) -> int | None:
        """The first of the decreasing `sizes` with which no process runs out of memory.

        Raises:
            UserError: This process is out of memory, and others wait for it in the pass, or no other pass is possible.
        """
        for rows in sizes:
            self.error = out_of_memory_in(partial(self.measure, rows))
            if self.error and not forget_failed_pass(self.model):
                raise explain_out_of_memory(self.error, rows, self.max_length)
            try:
                self.model.zero_grad(set_to_none=True)
                clear_device_cache(garbage_collection=self.error is not None)
                if self.agree(int(self.error is None)):  # 0 as soon as one process says 0
                    return rows
            except TimeoutError:
                raise explain_out_of_memory(self.error or "", rows, self.max_length) from None
        return None

    def measure(self, rows: int) -> None:
        self.peak = peak_bytes(lambda: self.trial(rows), self.device)

    def worth_compiling(self, sizes: Sequence[int]) -> Sequence[int]:
        """The decreasing `sizes` that may fit when compiled; compiling takes up to a minute per size.

        The largest size that fits uncompiled takes seconds to find; its memory tells which larger sizes may fit.
        """
        free, gradients = free_bytes(self.device), 4 * trainable(self.model)
        with torch.compiler.set_stance("force_eager"):
            found = self.first_that_fits(sizes)
        if found is None:
            return sizes[-1:]
        per_row = COMPILED_SHARE * (self.peak - gradients) / found
        largest = self.agree(next(rows for rows in sizes if rows == found or gradients + per_row * rows <= free))
        return [rows for rows in sizes if rows <= largest]


def peak_bytes(function: Callable[[], None], device: torch.device) -> int:
    """Peak memory that `function` allocates on the CUDA device."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still allocate on the CUDA device."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def trainable(model: nn.Module) -> int:
    """Number of trainable parameters that this process holds: under FSDP2, its shard."""
    return sum(local(p).numel() for p in model.parameters() if p.requires_grad)


def out_of_memory_in(function: Callable[[], None]) -> str | None:
    """The message if `function` runs out of memory, else None. The exception would keep its tensors alive."""
    try:
        function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, on any device."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def explain_out_of_memory(error: BaseException | str, per_device_train_batch_size: int, max_length: int) -> UserError:
    """The error that names the setting to lower, and its new value."""
    if per_device_train_batch_size > 1:
        smaller = divisors(per_device_train_batch_size)[1]
        remedy = f"set per_device_train_batch_size to {smaller}; gradient accumulation makes up the rest"
    else:
        remedy = (
            f"lower max_length to {max(1, max_length // 2)}, take a smaller depth, or shard the model across GPUs "
            "with accelerate_configs/fsdp2.yaml"
        )
    rows = f"{per_device_train_batch_size} row{'s' * (per_device_train_batch_size > 1)} of {max_length} tokens"
    return UserError(f"out of memory with {rows} in a pass: {remedy} ({first_words(error)})")


def explain_in_evaluation(error: BaseException, step: int) -> UserError:
    """The error for evaluations, whose batch size does not depend on the rows of a training pass."""
    return UserError(
        f"out of memory in the evaluation after step {step}, beside weights and optimizer state; lower max_length, "
        "take a smaller depth, or shard the model across GPUs with accelerate_configs/fsdp2.yaml "
        f"({first_words(error)})"
    )


def first_words(error: BaseException | str) -> str:
    return (str(error).splitlines() or [""])[0][:200] or "no details"


def memory_for_activations(model: nn.Module, state_bytes: int) -> float:
    """Bytes that a pass may use: a share of free memory per local process, minus gradients and optimizer state."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = SHARE_OF_MEMORY * psutil.virtual_memory().available / processes
    return free - 4 * trainable(model) - state_bytes


def activation_bytes(config: NanoChatConfig, max_length: int, rows: int, device: torch.device) -> int:
    """Bytes that a training pass holds, in float32: the tensors that autograd saves, and one chunk of logits.

    Beyond the common ones, each layer saves per token a row of the mask and two numbers per head (the divisors of its
    softmax and norms); without a fused kernel (MPS), also the scores of every head, twice.
    """
    scores = 2 * config.num_attention_heads * (1 if device.type == "cpu" else max_length)
    per_token = saved_bytes_per_token(config, 4, compiled=False) + 4 * config.num_hidden_layers * (max_length + scores)
    return rows * max_length * per_token + LOSS_BYTES_PER_LOGIT * chunk_logits(device)


def smallest(accelerator: Accelerator, number: int) -> int:
    """The smallest `number` over all processes."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.min())
