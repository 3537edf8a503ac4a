"""How many rows go through the model in one pass: the largest number that fits, found by itself.

Gradient accumulation makes up the rest of `total_batch_size`, so the number changes speed and memory, not the training:
it divides the rows of a process. Accelerate's `find_executable_batch_size` does not serve: it lowers the batch by a tenth
at a time, which divides nothing, and each process would settle on its own.
"""

import os
from collections.abc import Callable, Sequence

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import LOSS_BYTES_PER_LOGIT, saved_bytes_per_token
from modeling_nanochat.softcapped_loss import chunk_logits
from recipes.training.optim.fsdp import forget_failed_pass

# Tokens of a pass beyond which it gets no faster. On a CPU 4,096 were the fastest, at widths of 128 and 384; 32,768 took
# twice as long per token, for activations leave the caches. The original runs 65,536 on GPUs of 80 GB.
CPU_TOKENS = 2**12
ACCELERATOR_TOKENS = 2**17
SHARE_OF_MEMORY = 0.5  # of what is free, where it can only be estimated
COMPILED_SHARE = 0.85  # of the memory that a pass takes uncompiled; measured 0.83 for plain, 0.88 for turbo


def find_batch_size(
    model: nn.Module,
    max_length: int,
    rows_per_process: int,
    device: torch.device,
    trial: Callable[[int], None],
    agree: Callable[[int], int] = int,
    *,
    state_bytes: int = 0,
    compiled: bool = False,
) -> int:
    """The largest divisor of `rows_per_process` whose pass fits into the memory of every process.

    On CUDA by trial, beside the optimizer's state, which must be there already; elsewhere, where running out of memory
    stops the whole machine rather than the process, by an estimate.

    Args:
        model: The model to train, on its device.
        max_length: Tokens of a row.
        rows_per_process: Rows of a process in one optimizer step.
        trial: Runs forward and backward once with this many rows, as training will. On CUDA only.
        agree: Gives each process the smallest of the numbers that the processes call it with; see [`smallest`].
        state_bytes: Size of the optimizer's state in this process; zeros take no memory of a CPU's before they change.
        compiled: Whether the trial's pass is compiled.

    Raises:
        UserError: Not even one row fits.
    """
    limit = max(1, (CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS) // max_length)
    sizes = [rows for rows in divisors(rows_per_process) if rows <= limit]
    if device.type != "cuda":
        budget = memory_for_activations(model, state_bytes)
        fitting = [rows for rows in sizes if activation_bytes(model.config, max_length, rows, device) <= budget]
        return agree(max(fitting, default=1))
    trials = Trials(model, max_length, device, trial, agree)
    if found := trials.first_that_fits(trials.worth_compiling(sizes) if compiled else sizes):
        return found
    raise explain_out_of_memory(trials.error or "another process is out of memory", 1, max_length)


def divisors(number: int) -> list[int]:
    """From the largest to 1."""
    return [part for part in range(number, 0, -1) if number % part == 0]


class Trials:
    """Passes with falling numbers of rows. All processes try the same ones, since a pass may need all of them."""

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
        """The first of the falling `sizes` with which no process runs out of memory.

        Raises:
            UserError: This process has, and others wait for it within the pass, or another pass is not possible.
        """
        for rows in sizes:
            self.error = out_of_memory_in(lambda rows=rows: self.measure(rows))
            if self.error and not forget_failed_pass(self.model):
                raise explain_out_of_memory(self.error, rows, self.max_length)
            try:
                self.model.zero_grad(set_to_none=True)
                clear_device_cache(garbage_collection=self.error is not None)
                if self.agree(int(self.error is None)):  # 0 as soon as one process says 0
                    return rows
            except TimeoutError:
                raise explain_out_of_memory(self.error, rows, self.max_length) from None
        return None

    def measure(self, rows: int) -> None:
        self.peak = peak_bytes(lambda: self.trial(rows), self.device)

    def worth_compiling(self, sizes: Sequence[int]) -> Sequence[int]:
        """Those of the falling `sizes` that may fit once compiled; for each, compiling takes up to a minute.

        What fits uncompiled is found in seconds, and its memory tells which larger ones may fit when compiled.
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
    """The most that `function` has allocated on the CUDA device at any one time."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int:
    """What this process can still allocate on the CUDA device."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def trainable(model: nn.Module) -> int:
    """Parameters with gradients that this process holds: under FSDP2 its share."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in learnt)


def out_of_memory_in(function: Callable[[], None]) -> str | None:
    """What `function` said when it ran out of memory; None if it did not. The error itself would keep its tensors alive."""
    try:
        function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def explain_out_of_memory(error: BaseException | str, per_device_train_batch_size: int, max_length: int) -> UserError:
    """The error that tells which setting to lower, and to what."""
    if per_device_train_batch_size > 1:
        smaller = divisors(per_device_train_batch_size)[1]
        remedy = f"set per_device_train_batch_size to {smaller}; gradient accumulation makes up the rest"
    else:
        remedy = (
            f"lower max_length to {max(1, max_length // 2)}, take a smaller depth, or share the model between GPUs "
            "with accelerate_configs/fsdp2.yaml"
        )
    rows = f"{per_device_train_batch_size} row{'s' * (per_device_train_batch_size > 1)} of {max_length} tokens"
    return UserError(f"out of memory with {rows} in a pass: {remedy} ({first_words(error)})")


def explain_in_evaluation(error: BaseException, step: int) -> UserError:
    """The error that tells what helps where fewer rows in a training pass do not: evaluations have their own."""
    return UserError(
        f"out of memory in the evaluation after step {step}, beside weights and optimizer state; lower max_length, take a "
        f"smaller depth, or share the model between GPUs with accelerate_configs/fsdp2.yaml ({first_words(error)})"
    )


def first_words(error: BaseException | str) -> str:
    return (str(error).splitlines() or [""])[0][:200] or "no more is known"


def memory_for_activations(model: nn.Module, state_bytes: int) -> float:
    """Bytes that a pass may take: a share of what is free, less gradients and optimizer state, for each process here."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = SHARE_OF_MEMORY * psutil.virtual_memory().available / processes
    return free - 4 * trainable(model) - state_bytes


def activation_bytes(config: NanoChatConfig, max_length: int, rows: int, device: torch.device) -> int:
    """Bytes that a training pass holds, in float32: what autograd saves, and one chunk of logits.

    Beside what is saved in any case, in each layer and for each token a row of the mask, two numbers of each head (what its
    softmax and norms divided by); without a fused kernel (MPS) also the scores of every head, twice.
    """
    scores = 2 * config.num_attention_heads * (1 if device.type == "cpu" else max_length)
    per_token = saved_bytes_per_token(config, 4, compiled=False) + 4 * config.num_hidden_layers * (max_length + scores)
    return rows * max_length * per_token + LOSS_BYTES_PER_LOGIT * chunk_logits(device)


def smallest(accelerator: Accelerator, number: int) -> int:
    """The smallest of the `number`s that the processes call this with."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.min())
