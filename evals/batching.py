"""Batches of examples of similar length, to reduce padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel

Item = TypeVar("Item")

# Limits the memory of a forward pass with a few very long prompts; short prompts never reach it.
MAX_TOKENS_PER_BATCH = 16384
# Products of this size keep a CPU busy already; larger ones leave its caches.
MAX_TOKENS_ON_CPU = 1024
MAX_LOGITS = 2**26  # in memory at once: 256 MiB in float32, plus a few copies


def batches_by_length(
    lengths: Sequence[int], batch_size: int, max_tokens: int = MAX_TOKENS_PER_BATCH
) -> list[list[int]]:
    """Return batches of example indices, longest first, so that an out-of-memory error occurs at the start.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Maximum number of examples in a batch.
        max_tokens: Maximum number of tokens in a batch, padding included; a longer example gets its own batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < min(batch_size, max_tokens // max(1, lengths[batches[-1][0]])):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def most_tokens(model: PreTrainedModel) -> int:
    """Return the maximum number of tokens in a batch on the model's device."""
    return MAX_TOKENS_ON_CPU if model.device.type == "cpu" else MAX_TOKENS_PER_BATCH


def with_progress(
    batches: Sequence[list[Item]],
    progress: Callable[[int], Any] | None,
    examples: Callable[[list[Item]], int] = len,
) -> Iterator[list[Item]]:
    """Yield the batches; after each, call `progress` with its number of examples, like `tqdm.update`."""
    for batch in batches:
        yield batch
        if progress is not None:
            progress(examples(batch))
