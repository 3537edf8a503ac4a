"""Bits per byte: the loss of a text per byte instead of per token, so that tokenizers can be compared.

Defined as nats of the targets that have bytes / (ln 2 x bytes of those targets). Special tokens have no bytes and are
excluded from both sums.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.harness.processes import ALONE, Processes
from modeling_nanochat.linear import is_only_a_weight, linear
from modeling_nanochat.modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.text.bulk_encoding import BulkEncoder
from modeling_nanochat.text.texts import text_dataset
from modeling_nanochat.text.token_bytes import token_bytes
from modeling_nanochat.tokenization_nanochat import document_start, whole_characters

from .batching import MAX_LOGITS

METRIC = Path(__file__).parent / "metrics" / "bits_per_byte"


@torch.no_grad()
def nats_and_bytes(
    model: PreTrainedModel, batch: torch.Tensor | Mapping[str, torch.Tensor], token_bytes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nats (B,) in float64 and bytes (B,) of each row's targets; sum them over batches and ranks, then divide.

    Args:
        model: A causal language model.
        batch: Ids (B, T+1), each predicted from those before it; or {"input_ids", "labels"} (B, T+1), not shifted,
            with -100 for ignored targets.
        token_bytes: Bytes of each token (V,), see `modeling_nanochat.text.token_bytes`.
    """
    ids = batch if isinstance(batch, torch.Tensor) else batch["input_ids"]
    labels = ids if isinstance(batch, torch.Tensor) else batch["labels"]
    device = next(model.parameters()).device
    targets = labels[:, 1:].to(device)
    lengths = token_bytes.to(device)[targets.clamp(min=0)] * (targets >= 0)
    nats = token_nats(model, ids[:, :-1].to(device), targets) * (lengths > 0)
    return nats.cpu().sum(1, dtype=torch.float64), lengths.cpu().sum(1)  # on the CPU: MPS has no float64


def token_nats(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return nats (B, T) of each target, 0 where it is -100; at most MAX_LOGITS logits, or one row's, exist at once.

    For our models, the LM head is applied to chunks of positions. Other models, and heads that are more than a weight
    (adapters; FSDP, which gathers the head only in the model's own forward), process a few rows at a time.
    """
    if not (isinstance(model, NanoChatForCausalLM) and is_only_a_weight(model.lm_head)):
        rows = max(1, MAX_LOGITS // (ids.shape[1] * model.config.vocab_size))
        parts = zip(ids.split(rows), targets.split(rows), strict=True)
        logits = ((model(input_ids=part, use_cache=False).logits, target) for part, target in parts)
        # Row by row, so that only one row is copied to float32
        return torch.stack([cross_entropy(*row) for part in logits for row in zip(*part, strict=True)])
    hidden_states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    positions = max(1, MAX_LOGITS // model.config.vocab_size)
    parts = zip(hidden_states.flatten(0, 1).split(positions), targets.flatten().split(positions), strict=True)
    nats = [cross_entropy(model.softcap(linear(model.lm_head, part)), target) for part, target in parts]
    return torch.cat(nats).view_as(targets)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def text_bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 8,
    max_tokens: int = 200_000,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Return bits per byte of the texts in `files`: {"bits_per_byte", "standard_error", "bytes", "tokens", "rows"}.

    The documents, each prefixed with bos, are concatenated and cut into rows of `max_length` predictions, up to
    `max_tokens` tokens; the standard error is that of the ratio over rows. `processes` share the batches; all of them
    call this function and get the result.

    Raises:
        UserError: A file is missing, empty, or cannot be read.
    """
    import evaluate

    rows = text_rows(tokenizer, text_dataset(files, what="text_files")["text"], max_length, max_tokens)
    batches = [padded(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    own, quiet = processes.share(batches), None if processes.is_first else True
    progress = tqdm(own, desc="bits per byte", unit="batch", leave=False, disable=quiet)
    lengths = torch.from_numpy(token_bytes(tokenizer))
    results = processes.gather([nats_and_bytes(model, batch, lengths) for batch in progress])
    nats, counts = (torch.cat(column).tolist() for column in zip(*results, strict=True))
    figures = evaluate.load(str(METRIC), keep_in_memory=True).compute(nats=nats, bytes=counts)
    return {**figures, "tokens": sum(len(row) - 1 for row in rows), "rows": len(rows)}


def text_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], max_length: int, max_tokens: int
) -> list[list[int]]:
    """Return rows of at most `max_length` + 1 ids that overlap by one id, so that every id is predicted once."""
    stream = [token for _, token in zip(range(max_tokens), text_tokens(tokenizer, texts), strict=False)]
    return [stream[i : i + max_length + 1] for i in range(0, len(stream) - 1, max_length)]


def text_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[int]:
    """Yield the ids of all documents, each prefixed with bos, encoded lazily."""
    encoder, start = BulkEncoder(tokenizer), document_start(tokenizer)
    for text in texts:
        yield start
        for part in encoder.parts(whole_characters(text or "")):
            yield from encoder.text_ids(part).tolist()


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]),
        "labels": torch.tensor([[*row, *[-100] * (length - len(row))] for row in rows]),
    }
