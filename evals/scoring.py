"""Losses of token rows under a causal language model: what rows share is computed once, in batches by length.

The options of a question begin with the same tokens. These are fed once, into a key-value cache. What follows is fed
side by side in one row: each token has the position that it has in its own option, and sees the common tokens and its
own option. That is the computation of whole rows, without its repetitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, takewhile
from math import nan
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from modeling_nanochat.modeling_nanochat import CACHE

from .batching import MAX_LOGITS, batches_by_length, most_tokens, with_progress

LEAST_SAVED = 32  # tokens: about the cost of a second forward pass
COMMON, PADDING = -1, -2  # in place of a branch's number
WINDOWED = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True)
class Row:
    """A tokenized prompt; tokens from `start` on are scored, so `start` is at least 1."""

    ids: list[int]
    start: int

    @property
    def target(self) -> list[int]:
        return self.ids[self.start :]

    @property
    def fed(self) -> tuple[int, ...]:
        """What a model reads: no token is predicted from the last one."""
        return tuple(self.ids[:-1])


@dataclass(frozen=True)
class Score:
    """Mean loss in nats of a row's scored tokens, NaN if there are none, and the most likely token at each of them."""

    loss: float
    predicted: list[int]


UNSCORED = Score(nan, [])


@dataclass(frozen=True)
class Tree:
    """Rows by their number, and the first tokens `trunk` of all of them."""

    rows: dict[int, Row]
    trunk: tuple[int, ...]

    @cached_property
    def branches(self) -> list[tuple[int, ...]]:
        """The different continuations of the trunk; a single empty one if all rows read the same."""
        return list(dict.fromkeys(self.branch(row) for row in self.rows.values()))

    def branch(self, row: Row) -> tuple[int, ...]:
        return row.fed[len(self.trunk) :]

    @property
    def is_split(self) -> bool:
        return any(self.branches)

    @cached_property
    def size(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def cached(self) -> tuple[int, ...]:
        """What the first pass of a split tree reads. The last token of the trunk predicts, so it is left to the second."""
        return self.trunk[:-1]

    @property
    def read(self) -> list[int]:
        """What the second pass of a split tree reads, or the only pass of another."""
        tokens = [token for branch in self.branches for token in branch]
        return [self.trunk[-1], *tokens] if self.is_split else list(self.trunk)

    def layout(self) -> tuple[list[int], list[int]]:
        """The position and the branch of each token that the second pass reads."""
        end = len(self.trunk)
        positions = [end - 1, *(end + i for branch in self.branches for i in range(len(branch)))]
        return positions, [COMMON, *(number for number, branch in enumerate(self.branches) for _ in branch)]

    def columns(self, row: Row) -> list[int]:
        """Where in [`read`] the row's scored tokens are predicted."""
        first, end = row.start - 1, len(row.ids) - 1
        if not self.is_split:
            return list(range(first, end))
        begins = list(accumulate(map(len, self.branches), initial=1))
        begin, length = begins[self.branches.index(self.branch(row))], len(self.trunk)
        return [begin + position - length if position >= length else 0 for position in range(first, end)]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all sequences."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def trees_of(rows: dict[int, Row], share: bool) -> list[Tree]:
    """Return the trees of a group of rows: a single one if that saves enough, else one per different row."""
    by_fed: dict[tuple[int, ...], dict[int, Row]] = {}
    for number, row in rows.items():
        by_fed.setdefault(row.fed, {})[number] = row
    # A row is scored from the last token of the trunk on, at the earliest.
    common = min([common_prefix(list(by_fed)), *(row.start for row in rows.values())])
    if share and (len(by_fed) - 1) * (common - 1) >= LEAST_SAVED:
        return [Tree(rows, next(iter(by_fed))[:common])]
    return [Tree(same, fed) for fed, same in by_fed.items()]


def score_groups(
    model: PreTrainedModel, groups: Sequence[Sequence[Row]], batch_size: int = 32, progress: Any = None
) -> list[list[Score]]:
    """Return the score of each row; what all rows of a group begin with is computed once.

    Args:
        model: A causal language model in evaluation mode.
        groups: The rows of each question.
        batch_size: Maximum number of groups in a forward pass, fewer if they are long. With 1 nothing is shared and
            every row is fed alone.
        progress: Called with the number of rows just scored.
    """
    share, trees, count = batch_size > 1 and can_share(model), [], 0
    for group in groups:
        scored = {count + i: row for i, row in enumerate(group) if row.target}
        trees += trees_of(scored, share) if scored else []
        count += len(group)
    scores = [UNSCORED] * count
    for batch in tree_batches(trees, batch_size, model):
        for number, score in score_trees(model, batch).items():
            scores[number] = score
        if progress is not None:
            progress(sum(len(tree.rows) for tree in batch))
    remaining = iter(scores)
    return [[next(remaining) for _ in group] for group in groups]


def tree_batches(trees: Sequence[Tree], batch_size: int, model: PreTrainedModel) -> list[list[Tree]]:
    """Return batches of trees of similar size, split ones apart from the others."""
    batches = []
    for is_split in (True, False):
        alike = [tree for tree in trees if tree.is_split == is_split]
        for batch in batches_by_length([tree.size for tree in alike], batch_size, most_tokens(model.device)):
            batches += within_memory([alike[i] for i in batch], model.config.vocab_size)
    return batches


def within_memory(batch: list[Tree], vocab_size: int) -> list[list[Tree]]:
    """Return the batch, halved until the logits of each part fit into MAX_LOGITS or it is a single tree."""
    scored = sum(len(row.target) for tree in batch for row in tree.rows.values())
    if len(batch) == 1 or scored * vocab_size <= MAX_LOGITS:
        return [batch]
    half = len(batch) // 2
    return within_memory(batch[:half], vocab_size) + within_memory(batch[half:], vocab_size)


@torch.no_grad()
def score_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> dict[int, Score]:
    """Score the rows of trees, all split or none, by their numbers. Padding is on the right, where no token sees it."""
    places = {
        number: [(i, column) for column in tree.columns(row)]
        for i, tree in enumerate(trees)
        for number, row in tree.rows.items()
    }
    index = {place: i for i, place in enumerate(dict.fromkeys(place for row in places.values() for place in row))}
    inputs = second_pass(model, trees) if trees[0].is_split else {"use_cache": False}
    logits = logits_at(model, list(index), input_ids=padded([tree.read for tree in trees], model.device), **inputs)
    rows = {number: row for tree in trees for number, row in tree.rows.items()}
    losses, predicted = [], []
    for number, row in rows.items():  # by row, to avoid a float32 copy of all
        scored = logits[[index[place] for place in places[number]]].float()
        losses.append(F.cross_entropy(scored, torch.tensor(row.target, device=scored.device)))
        predicted.append(scored.argmax(-1))
    tokens, values = iter(torch.cat(predicted).tolist()), torch.stack(losses).tolist()
    return {n: Score(loss, [next(tokens) for _ in row.target]) for loss, (n, row) in zip(values, rows.items(), strict=True)}


def second_pass(model: PreTrainedModel, trees: Sequence[Tree]) -> dict[str, Any]:
    """Feed what precedes the trunks' last tokens; return the keywords of the pass that reads the rest."""
    first, cache = padded([tree.cached for tree in trees], model.device), DynamicCache()
    model(input_ids=first, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    columns = torch.arange(first.shape[1], device=model.device)
    lengths = torch.tensor([[len(tree.cached)] for tree in trees], device=model.device)
    positions, branches = zip(*(tree.layout() for tree in trees), strict=True)
    positions, branches = padded(positions, model.device), padded(branches, model.device, PADDING)
    all_positions = torch.cat([columns.expand(len(trees), -1), positions], 1)
    all_branches = torch.cat([torch.where(columns < lengths, COMMON, PADDING), branches], 1)
    distance, keys = positions[:, :, None] - all_positions[:, None], all_branches[:, None]
    seen = (distance >= 0) & ((keys == COMMON) | (keys == branches[:, :, None]))
    return {"attention_mask": masks(model, seen, distance), "position_ids": positions, "use_cache": True, CACHE: cache}


def masks(model: PreTrainedModel, seen: torch.Tensor, distance: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """Masks (B, 1, queries, keys) from both of (B, queries, keys): one, or one per kind of layer if there are several."""
    windows = attention_windows(model)
    made = {kind: seen if window is None else seen & (distance < window) for kind, window in windows.items()}
    if model.config._attn_implementation == "eager":  # adds its mask
        least = torch.finfo(model.dtype).min
        made = {kind: torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, least) for kind, mask in made.items()}
    made = {kind: mask[:, None] for kind, mask in made.items()}
    return made if len(made) > 1 else next(iter(made.values()))


def attention_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The window of each kind of layer, None for full attention."""
    decoder = model.config.get_text_config(decoder=True)
    window = getattr(decoder, "sliding_window", None)
    kinds = getattr(decoder, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def can_share(model: PreTrainedModel) -> bool:
    """Whether rows that share a beginning get the same scores as whole ones, found by trying a few tokens.

    Not with a state in place of keys and values, nor with kernels or position codes that ignore masks or positions.
    """
    if model.config._attn_implementation not in ("sdpa", "eager") or not attention_windows(model).keys() <= WINDOWED.keys():
        return False
    ids = [7 * i % model.config.vocab_size for i in range(16)]
    long = {0: Row(ids, 10), 1: Row([*ids[:10], 3, 2, 1], 10)}
    short = {2: Row(ids[:8], 5), 3: Row([*ids[:5], 1, 2], 5)}
    try:
        shared = score_trees(model, [Tree(long, tuple(ids[:10])), Tree(short, tuple(ids[:5]))])
        whole = score_trees(model, [tree for rows in (long, short) for tree in trees_of(rows, share=False)])
    except Exception:  # whatever a model raises if its cache or its masks are others
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    return all(abs(shared[number].loss - score.loss) <= tolerance for number, score in whole.items())


def logits_at(model: PreTrainedModel, places: Sequence[tuple[int, int]], **inputs: Any) -> torch.Tensor:
    """Return the logits (N, V) at N places (row, column); the head runs at these only.

    `logits_to_keep` would keep the same columns of all rows.
    """
    rows, columns = (torch.tensor(part, device=model.device) for part in zip(*places, strict=True))
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][rows, columns][None], *hidden[1:]))
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return logits[0]


def padded(rows: Sequence[Sequence[int]], device: torch.device, value: int = 0) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)
