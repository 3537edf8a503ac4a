"""Bits per byte on rows set aside, measured alike by one process or many."""

import math
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.bits_per_byte import nats_and_bytes, token_bytes
from modeling_nanochat.errors import UserError


def validation(
    accelerator: Accelerator,
    rows: Iterable[dict[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    max_rows: int,
) -> Callable[[PreTrainedModel], float]:
    """A function that measures bits per byte on the first `max_rows` rows, dealt out over the processes.

    Raises:
        UserError: There is not one row.
    """
    chosen = list(islice(rows, max_rows))
    if not chosen:
        raise UserError("the validation text does not fill one row of max_length tokens; add text or lower max_length")
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    batches = [
        {key: torch.stack([row[key] for row in mine[start : start + batch_size]]) for key in ("input_ids", "labels")}
        for start in range(0, len(mine), batch_size)
    ]
    lengths = token_bytes(tokenizer)

    def bits_per_byte(model: PreTrainedModel) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            nats, byte_count = nats_and_bytes(model, batch, lengths)
            sums += torch.stack([nats.sum(), byte_count.sum()])
        nats, byte_count = accelerator.reduce(sums.float().to(accelerator.device), "sum").tolist()
        return nats / (math.log(2) * byte_count) if byte_count else math.inf

    return bits_per_byte
