"""How many rows go through the model in one pass: the largest number that fits, found by itself.

Gradient accumulation makes up the rest of `total_batch_size`, so the number changes speed and memory, not the training:
it divides the rows of a process. Accelerate's `find_executable_batch_size` does not serve: it lowers the batch by a tenth
at a time, which divides nothing, and each process would settle on its own.
"""

import os
from collections.abc import Callable

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import saved_bytes_per_token
from modeling_nanochat.softcapped_loss import chunk_logits

# Tokens of a pass beyond which it gets no faster. On a CPU 4,096 were the fastest, at widths of 128 and 384; 32,768 took
# twice as long per token, for activations leave the caches. The original runs 65,536 on GPUs of 80 GB.
CPU_TOKENS = 2**12
ACCELERATOR_TOKENS = 2**17
SHARE_OF_MEMORY = 0.5  # of what is free, where it can only be estimated
STATE_BYTES = 8  # per parameter: AdamW's moments, or Muon's momentum and its working memory


def find_batch_size(
    model: nn.Module,
    max_length: int,
    rows_per_process: int,
    device: torch.device,
    trial: Callable[[int], None],
    agree: Callable[[int], int] = int,
) -> int:
    """The largest divisor of `rows_per_process` whose pass fits into the memory of every process.

    On CUDA by trial, with room left for the optimizer's state; elsewhere, where running out of memory stops the whole
    machine rather than the process, by an estimate.

    Args:
        model: The bare model, on its device.
        max_length: Tokens of a row.
        rows_per_process: Rows of a process in one optimizer step.
        trial: Runs forward and backward once with this many rows. On CUDA only; not compiled, or every trial compiles.
        agree: Gives each process the smallest of the numbers that the processes call it with; see [`smallest`].

    Raises:
        UserError: Not even one row fits.
    """
    limit = max(1, (CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS) // max_length)
    sizes = [rows for rows in divisors(rows_per_process) if rows <= limit]
    if device.type != "cuda":
        budget = memory_for_activations(model)
        fitting = [rows for rows in sizes if activation_bytes(model.config, max_length, rows, device) <= budget]
        return agree(max(fitting, default=1))
    return by_trial(model, sizes, max_length, device, trial, agree)


def divisors(number: int) -> list[int]:
    """From the largest to 1."""
    return [part for part in range(number, 0, -1) if number % part == 0]


def by_trial(
    model: nn.Module,
    sizes: list[int],
    max_length: int,
    device: torch.device,
    trial: Callable[[int], None],
    agree: Callable[[int], int],
) -> int:
    """The first of the falling `sizes` that fits; all processes try the same ones, since a pass may need all of them."""
    for rows in sizes:
        error = out_of_memory_in(lambda rows=rows: with_state(model, device, trial, rows))
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=error is not None)
        if agree(int(error is None)):  # 0 as soon as one process says 0
            return rows
    raise explain_out_of_memory(error or "another process is out of memory", 1, max_length)


def with_state(model: nn.Module, device: torch.device, trial: Callable[[int], None], rows: int) -> None:
    """The trial, while as much memory is taken as the optimizer will need from its first step on."""
    state = take_memory(STATE_BYTES * trainable(model), device)
    trial(rows)
    del state


def take_memory(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


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
    said = (str(error).splitlines() or [""])[0][:200]
    if per_device_train_batch_size > 1:
        smaller = divisors(per_device_train_batch_size)[1]
        remedy = f"set per_device_train_batch_size to {smaller}; gradient accumulation makes up the rest"
    else:
        remedy = (
            f"lower max_length to {max(1, max_length // 2)}, take a smaller depth, or share the model between GPUs "
            "with accelerate_configs/fsdp2.yaml"
        )
    rows = f"{per_device_train_batch_size} row{'s' * (per_device_train_batch_size > 1)} of {max_length} tokens"
    return UserError(f"out of memory with {rows} in a pass: {remedy} ({said or 'no more is known'})")


def memory_for_activations(model: nn.Module) -> float:
    """Bytes that a pass may take: a share of what is free, less gradients and optimizer state, for each process here."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = SHARE_OF_MEMORY * psutil.virtual_memory().available / processes
    return free - (4 + STATE_BYTES) * trainable(model)


def activation_bytes(config: NanoChatConfig, max_length: int, rows: int, device: torch.device) -> int:
    """Bytes that a training pass holds, in float32: what autograd saves, and one chunk of logits.

    Beside what is saved in any case, in each layer and for each token a row of the mask; without a fused kernel (MPS) also
    the scores of every head, twice.
    """
    scores = 0 if device.type == "cpu" else 2 * config.num_attention_heads * max_length
    per_token = saved_bytes_per_token(config, 4, compiled=False) + 4 * config.num_hidden_layers * (max_length + scores)
    return rows * max_length * per_token + 4 * 3 * chunk_logits(device)


def smallest(accelerator: Accelerator, number: int) -> int:
    """The smallest of the `number`s that the processes call this with."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.min())
