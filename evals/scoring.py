"""Losses of token rows under a causal language model: what rows share is computed once, in batches by length."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, nan
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from modeling_nanochat.modeling_nanochat import CACHE

from .batching import MAX_LOGITS, batches_by_length, most_tokens, with_progress
from .token_trees import TRUNK, Row, Tree, trees_of

PADDING = -2  # in place of a branch's number
ATTENTION = ("sdpa", "eager")  # kernels that take any mask
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Score:
    """Mean loss in nats of a row's scored tokens, NaN if there are none, and the most likely token at each of them."""

    loss: float
    predicted: list[int]

    @property
    def is_finite(self) -> bool:
        return isfinite(self.loss)


class Filled(Exception):
    """Raised to end a forward pass whose keys and values are all in the cache."""


class FilledCache(DynamicCache):
    """A cache that ends the forward pass that has filled its last layer: the output of that pass is not needed.

    The rest of the layer would be a fifth of the pass of a model of four layers. A pass of a sharded model does not
    end early: FSDP has to free what it has gathered.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.empty = set(range(model.config.get_text_config(decoder=True).num_hidden_layers))
        self.ends = not any(isinstance(weight, DTensor) for weight in model.parameters())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        fills = layer_idx in self.empty
        self.empty.discard(layer_idx)
        if self.ends and fills and not self.empty:
            raise Filled
        return updated


class Scorer:
    """Scores rows of tokens.

    Args:
        model: A causal language model in evaluation mode.
        batch_size: Maximum number of questions in a forward pass, fewer if they are long. 1 is the reference: every
            row is read whole and alone.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 32):
        self.model, self.batch_size = model, batch_size

    @cached_property
    def shares(self) -> bool:
        return can_share(self.model)

    def scores(
        self, questions: Sequence[Sequence[Row]], progress: Callable[[int], Any] | None = None
    ) -> list[list[Score]]:
        """Return the score of each row of each question; what all rows of a question begin with is computed once.

        `progress` is called with the number of rows just scored.
        """
        trees: list[Tree] = []
        numbers = iter(range(sum(map(len, questions))))
        numbered = [{next(numbers): row for row in rows} for rows in questions]
        for rows in numbered:
            scored = {number: row for number, row in rows.items() if row.target}
            trees += self.trees(scored) if scored else []
        scores: dict[int, Score] = {}
        for batch in with_progress(self.batches(trees), progress, lambda batch: sum(len(tree.rows) for tree in batch)):
            scores |= score_trees(self.model, batch)
        return [[scores.get(number, Score(nan, [])) for number in rows] for rows in numbered]

    def trees(self, rows: dict[int, Row]) -> list[Tree]:
        if self.batch_size == 1:
            return [Tree({number: row}, row.fed) for number, row in rows.items()]
        trees = trees_of(rows, share=True)
        is_split = any(tree.is_split for tree in trees)  # otherwise the model need not be tried
        return trees if not is_split or self.shares else trees_of(rows, share=False)

    def batches(self, trees: Sequence[Tree]) -> list[list[Tree]]:
        """Return batches of trees of similar size, split ones apart from the others."""
        batches = []
        for is_split in (True, False):
            alike = [tree for tree in trees if tree.is_split == is_split]
            for batch in batches_by_length([tree.size for tree in alike], self.batch_size, most_tokens(self.model)):
                batches += within_memory([alike[i] for i in batch], vocab_size(self.model))
        return batches


def within_memory(batch: list[Tree], vocab_size: int) -> list[list[Tree]]:
    """Return the batch, halved until the logits of each part fit into MAX_LOGITS or it is a single tree."""
    scored = sum(len(row.target) for tree in batch for row in tree.rows.values())
    if len(batch) == 1 or scored * vocab_size <= MAX_LOGITS:
        return [batch]
    half = len(batch) // 2
    return within_memory(batch[:half], vocab_size) + within_memory(batch[half:], vocab_size)


def context_of(model: PreTrainedModel) -> int:
    """Return the most tokens that the model can read; models without attention have no such limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize


def vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


@torch.no_grad()
def score_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> dict[int, Score]:
    """Score the rows of trees, all split or none, by their numbers. Padding is on the right, where nothing sees it."""
    rows = {number: row for tree in trees for number, row in tree.rows.items()}
    places = [
        (i, column) for i, tree in enumerate(trees) for row in tree.rows.values() for column in tree.columns(row)
    ]
    different = {place: i for i, place in enumerate(dict.fromkeys(places))}
    inputs = second_pass(model, trees) if trees[0].is_split else {"use_cache": False}
    logits = logits_at(model, list(different), input_ids=padded(model, [tree.read_last for tree in trees]), **inputs)
    index = torch.tensor([different[place] for place in places], device=logits.device)
    targets = torch.tensor([token for row in rows.values() for token in row.target], device=logits.device)
    lengths, losses, predicted = [len(row.target) for row in rows.values()], [], []
    for kept, target in zip(index.split(lengths), targets.split(lengths), strict=True):  # no float32 copy of all
        scored = logits[kept].float()
        losses.append(F.cross_entropy(scored, target))
        predicted.append(scored.argmax(-1))
    tokens, values = iter(torch.cat(predicted).tolist()), torch.stack(losses).tolist()
    return {
        number: Score(loss, [next(tokens) for _ in row.target])
        for (number, row), loss in zip(rows.items(), values, strict=True)
    }


def second_pass(model: PreTrainedModel, trees: Sequence[Tree]) -> dict[str, Any]:
    """Run the first pass of split trees, and return the keywords of the second one beside its ids."""
    first, cache = padded(model, [tree.read_first for tree in trees]), FilledCache(model)
    with suppress(Filled):
        model(input_ids=first, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    columns = torch.arange(first.shape[1], device=model.device)
    lengths = torch.tensor([[len(tree.read_first)] for tree in trees], device=model.device)
    positions = padded(model, [tree.positions for tree in trees])
    owners = padded(model, [tree.owners for tree in trees], PADDING)
    key_positions = torch.cat([columns.expand(len(trees), -1), positions], 1)[:, None]
    key_owners = torch.cat([torch.where(columns < lengths, TRUNK, PADDING), owners], 1)[:, None]
    distance = positions[:, :, None] - key_positions
    seen = (distance >= 0) & ((key_owners == TRUNK) | (key_owners == owners[:, :, None]))
    return {"attention_mask": masks(model, seen, distance), "position_ids": positions, "use_cache": True, CACHE: cache}


def masks(
    model: PreTrainedModel, seen: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the mask (B, 1, queries, keys), or one for each kind of layer, from (B, queries, keys) each."""
    made = {}
    for kind, window in attention_windows(model).items():
        mask = (seen if window is None else seen & (distance < window))[:, None]
        if model.config._attn_implementation == "eager":  # adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        made[kind] = mask
    return made if len(made) > 1 else next(iter(made.values()))


def attention_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Return how many tokens each kind of layer sees, None for all."""
    decoder = model.config.get_text_config(decoder=True)
    window = getattr(decoder, "sliding_window", None)
    kinds = getattr(decoder, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def can_share(model: PreTrainedModel) -> bool:
    """Whether trees get the scores of whole rows, found by trying it on a few tokens.

    They do not if a model has a state in place of keys and values, or ignores masks or positions.
    """
    if model.config._attn_implementation not in ATTENTION or not attention_windows(model).keys() <= LAYERS:
        return False
    ids = [7 * i % vocab_size(model) for i in range(16)]
    long, short = (
        {0: Row(ids, 10), 1: Row([*ids[:10], 3, 2, 1], 10)},
        {2: Row(ids[:8], 5), 3: Row([*ids[:5], 1, 2], 5)},
    )
    try:
        shared = score_trees(model, [Tree(long, tuple(ids[:10])), Tree(short, tuple(ids[:5]))])
    except Exception:  # whatever a model raises that takes no such cache, mask or positions
        return False
    whole = score_trees(model, [tree for rows in (long, short) for tree in trees_of(rows, share=False)])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2  # nats
    return all(abs(shared[number].loss - score.loss) <= tolerance for number, score in whole.items())


def logits_at(model: PreTrainedModel, places: Sequence[tuple[int, int]], **inputs: Any) -> torch.Tensor:
    """Return the logits (N, V) at N places (row, column) of the model's output.

    The head runs at these places only. `logits_to_keep` would keep the same columns of all rows, mostly in vain.
    """
    rows, columns = (torch.tensor(part, device=model.device) for part in zip(*places, strict=True))
    head, cut = model.get_output_embeddings(), []

    def keep(_: Any, arguments: tuple) -> tuple:
        cut.append(True)
        return arguments[0][rows, columns][None], *arguments[1:]

    hook = head.register_forward_pre_hook(keep) if head is not None else None
    try:
        logits = model(**inputs).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if cut else logits[rows, columns]


def padded(model: PreTrainedModel, rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
    """Return rows of integers as a tensor (rows, longest) on the model's device, padded on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(model.device)
