"""Which examples go through the model together: neighbours in length, so that little is spent on padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Bounds the memory of one forward pass where a few prompts are very long; short prompts never reach it.
MAX_TOKENS_PER_BATCH = 16384
MAX_LOGITS = 2**26  # held at once; 256 MiB in float32, a few times over


def batches_by_length(
    lengths: Sequence[int], batch_size: int, max_tokens: int = MAX_TOKENS_PER_BATCH
) -> list[list[int]]:
    """Indices of examples in batches, the longest first: what does not fit in memory fails at once, not at the end.

    Args:
        lengths: Tokens of each example.
        batch_size: Most examples in a batch.
        max_tokens: Most tokens in a batch, padding included; a longer example is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < min(batch_size, max_tokens // max(1, lengths[batches[-1][0]])):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def with_progress(batches: Sequence[list[int]], progress: Callable[[int], Any] | None) -> Iterator[list[int]]:
    """The batches; `progress` is called with the number of examples after each, like `tqdm.update`."""
    for batch in batches:
        yield batch
        if progress is not None:
            progress(len(batch))
