"""Bits per byte: the loss of a text per byte instead of per token, so that tokenizers can be compared.

Defined as nats of the text's tokens / (ln 2 x UTF-8 bytes of the text). What separates documents has no bytes and is
excluded from both sums.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.harness.processes import ALONE, Processes
from modeling_nanochat.linear import is_only_a_weight, linear
from modeling_nanochat.modeling_nanochat import NanoChatForCausalLM
from modeling_nanochat.text.bulk_encoding import BulkEncoder, code_points
from modeling_nanochat.text.texts import text_dataset
from modeling_nanochat.text.token_bytes import token_bytes
from modeling_nanochat.tokenization_nanochat import check_blanks, document_start, whole_characters

from .batching import MAX_LOGITS
from .scoring import padded

METRIC = Path(__file__).parent / "metrics" / "bits_per_byte"
NO_TEXT = -1  # bytes of the token that separates documents


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
    """Return bits per byte of the texts in `files`: {"bits_per_byte", "standard_error", "bytes", "tokens", ...}.

    The documents, each prefixed with bos, are concatenated and cut into "rows" of `max_length` predictions, up to
    `max_tokens` tokens; the standard error is that of the ratio over rows. "unknown" tokens stand for text that the
    tokenizer cannot spell, which makes the figure too low. `processes` share the batches; all of them call this
    function and get the result.

    Raises:
        UserError: A file is missing, empty, or cannot be read.
    """
    import evaluate

    rows = text_rows(tokenizer, text_dataset(files, what="text_files")["text"], max_length, max_tokens)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    own, quiet = processes.share(batches), None if processes.is_first else True
    progress = tqdm(own, desc="bits per byte", unit="batch", leave=False, disable=quiet)
    nats = torch.cat(processes.gather([row_nats(model, batch) for batch in progress])).tolist()
    targets = [row[1:][row[1:, 1] != NO_TEXT] for row in rows]
    counts = [int(row[:, 1].sum()) for row in targets]
    figures = evaluate.load(str(METRIC), keep_in_memory=True).compute(nats=nats, bytes=counts)
    unknown = sum(int((row[:, 0] == tokenizer.unk_token_id).sum()) for row in targets)
    return {**figures, "tokens": sum(len(row) - 1 for row in rows), "rows": len(rows), "unknown": unknown}


@torch.no_grad()
def row_nats(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Return nats (B,) in float64 of the text of each of `text_rows`."""
    ids = padded(model, [row[:, 0].tolist() for row in rows])
    sizes = padded(model, [row[:, 1].tolist() for row in rows], NO_TEXT)
    targets = ids.masked_fill(sizes == NO_TEXT, -100)[:, 1:]
    return token_nats(model, ids[:, :-1], targets).cpu().sum(1, dtype=torch.float64)


def text_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], max_length: int, max_tokens: int
) -> list[np.ndarray]:
    """Return rows (at most `max_length` + 1, 2) of `text_tokens` that overlap by one: every id is predicted once."""
    stream = np.fromiter(islice(text_tokens(tokenizer, texts), max_tokens), np.dtype((np.int64, 2)))
    return [stream[i : i + max_length + 1] for i in range(0, len(stream) - 1, max_length)]


def text_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield (id, UTF-8 bytes) of each token of all documents, each of which begins with (bos, NO_TEXT); lazily."""
    encoder, start = BulkEncoder(tokenizer), document_start(tokenizer)
    sizes = token_bytes(tokenizer) if encoder.may_be_cut else None  # only if the tokens are the bytes of the text
    for text in texts:
        yield start, NO_TEXT
        for part in encoder.parts(whole_characters(text or "")):
            if sizes is None:
                yield from tokens_in_place(encoder.tokenizer, part)
            else:
                ids = encoder.text_ids(part)
                yield from zip(ids.tolist(), sizes[ids].tolist(), strict=True)


def tokens_in_place(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Yield (id, UTF-8 bytes) of a document's tokens, measured where they end in the text.

    That holds for every tokenizer: SentencePiece's tokens do not spell the bytes of a text, and other text is
    normalized first. What no token covers counts for the next one, at the end for the last one.
    """
    check_blanks(text)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    points = code_points(text)
    before = np.concatenate([[0], np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))])
    # The tokens of a single character may all have its place, or none but the last
    ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], dtype=np.int64))
    ends[-1:] = len(text)
    yield from zip(encoding.ids, np.diff(before[ends], prepend=0).tolist(), strict=True)
