"""Which two tokens each token was merged from, where only the tokens and their order are known."""

from itertools import pairwise

from ..errors import UserError
from ..tokenization_nanochat import byte_symbols


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The two parts of each token of several bytes, in byte symbols, by rank.

    Encoding applies the earliest merge that is possible, again and again. No merge crosses the edges of what ends up as
    one token, so its parts are the same in every text: those that are left when all earlier merges are done.

    Args:
        ranks: Token -> its place in the order of merging, the 256 single bytes first.

    Raises:
        UserError: A token does not come from merging two others.
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
    """`token` cut into bytes, after every merge that ranks before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = ((ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(parts)))
        rank, i = min(pairs)
        if rank >= ranks[token]:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
