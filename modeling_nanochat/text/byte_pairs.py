"""Reconstruction of BPE merges from the tokens and their ranks alone."""

from itertools import pairwise

from ..errors import UserError
from ..tokenization_nanochat import byte_symbols


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The two parts of each multi-byte token, in byte symbols, by rank.

    Encoding repeatedly applies the earliest possible merge. No merge crosses the edges of what becomes one token,
    so its two parts are the same in every text: those that remain after all earlier merges.

    Args:
        ranks: Token -> its rank in the order of merges, the 256 single bytes first.

    Raises:
        UserError: A token is not a merge of two others.
    """
    symbols, merges = byte_symbols(), []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = merged(token, ranks)
        if len(parts) != 2:
            raise UserError(f"its token {ranks[token]} ({token!r}) does not come from merging two others")
        left, right = ("".join(symbols[byte] for byte in part) for part in parts)
        merges.append((left, right))
    return merges


def merged(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of `token` after every merge that ranks before it, starting from single bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = ((ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(parts)))
        rank, i = min(pairs)
        if rank >= ranks[token]:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
