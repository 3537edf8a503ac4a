"""Bits per byte on held-out rows: the same rows in the same order on one process or many."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.bits_per_byte import nats_and_bytes
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.bulk_encoding import BulkEncoder
from modeling_nanochat.text.texts import text_source
from modeling_nanochat.text.token_bytes import token_bytes
from recipes.training.data.documents import CHUNK_SIZE, is_text
from recipes.training.data.packing import Conversation, pack_conversations, pack_documents

Row = dict[str, torch.Tensor]
MAX_ROWS, MAX_TOKENS = 32, 2**16  # per forward pass; long rows mean smaller batches


@dataclass(frozen=True)
class Evaluation:
    """A measurement at intervals: every process calls `run` with the model in evaluation mode.

    `run` returns values for the log and lines to print. It always runs after the last step; `at_start` adds step 0.
    """

    every: int
    run: Callable[[PreTrainedModel], tuple[dict[str, object], list[str]]]
    at_start: bool = False

    def due(self, step: int, max_steps: int) -> bool:
        return self.at_start if step == 0 else step == max_steps or (self.every > 0 and step % self.every == 0)


def text_rows(files: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int, what: str) -> Iterator[Row]:
    """Yield rows of `max_length` + 1 ids, packed from the documents in order, in one pass."""
    texts, encoder = text_source(files, what=what), BulkEncoder(tokenizer)
    batches = (encoder.encode([text for text in batch["text"] if is_text(text)]) for batch in texts.iter(CHUNK_SIZE))
    for row in pack_documents(batches, max_length + 1):
        ids = torch.from_numpy(row)
        yield {"input_ids": ids, "labels": ids}


def conversation_rows(conversations: Sequence[Conversation], pad_token_id: int, max_length: int) -> Iterator[Row]:
    """Yield padded rows of `max_length` + 1 ids from rendered conversations, in one pass; masked labels are -100."""
    for ids, labels in pack_conversations([conversations], max_length + 1, pad_token_id):
        yield {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def validation(
    accelerator: Accelerator,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerFast,
    max_rows: int,
) -> Callable[[PreTrainedModel], float]:
    """A function that measures bits per byte on the first `max_rows` rows, sharded across processes.

    Raises:
        UserError: There is not a single row.
    """
    chosen = list(islice(rows, max_rows))
    if not chosen:
        raise UserError("the validation text does not fill one row of max_length tokens; add text or lower max_length")
    batch_size = max(1, min(MAX_ROWS, MAX_TOKENS // (len(chosen[0]["input_ids"]) - 1)))
    # Pad with fully masked rows: under FSDP every rank must run the same number of forward passes
    masked = {"input_ids": chosen[0]["input_ids"], "labels": torch.full_like(chosen[0]["input_ids"], -100)}
    chosen += [masked] * (-len(chosen) % accelerator.num_processes)
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    batches = [
        {key: torch.stack([row[key] for row in mine[start : start + batch_size]]) for key in ("input_ids", "labels")}
        for start in range(0, len(mine), batch_size)
    ]
    lengths = torch.from_numpy(token_bytes(tokenizer))

    def bits_per_byte(model: PreTrainedModel) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            nats, byte_count = nats_and_bytes(model, batch, lengths)
            sums += torch.stack([nats.sum(), byte_count.sum()])
        nats, byte_count = accelerator.reduce(sums.float().to(accelerator.device), "sum").tolist()
        return nats / (math.log(2) * byte_count) if byte_count else math.inf

    return bits_per_byte


def bits_per_byte_evaluation(bits_per_byte: Callable[[PreTrainedModel], float], every: int) -> Evaluation:
    """[`validation`]'s function as an [`Evaluation`]: before the first step, at intervals, after the last."""

    def run(model: PreTrainedModel) -> tuple[dict[str, object], list[str]]:
        value = bits_per_byte(model)
        return {"bits_per_byte": value}, [f"{value:.4f} bits per byte on held-out text"]

    return Evaluation(every, run, at_start=True)
