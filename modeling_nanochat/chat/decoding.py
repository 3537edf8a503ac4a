"""Decoding of a batch: prompts first, then one token per row and step; rows may leave and others enter.

[`Decoder`] has a growing cache and only the rows in use. [`CompiledDecoder`] has a cache of fixed size and a compiled
step: it starts half a minute later, on a GPU the first time a minute or two, and then runs faster, so it suits long
chats, many questions and measurements.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from ..modeling_nanochat import CACHE
from .cpu_step import step_of
from .cuda_graph import captured
from .frame import Frame, FrameLayer, arrange

Mask = torch.Tensor | dict[str, torch.Tensor | None] | None

SMALLEST_STEP = 64
# A step consists of narrow products. On a GPU, this option turns those of one row into reductions and tunes them (d20
# on an H100: 883 -> 1,185 steps/s); on a CPU, Inductor's kernels are benchmarked against the BLAS library's.
CUDA_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}
CPU_OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "epilogue_fusion": False,  # torch 2.13 fails to fuse into its own kernels for turbo at 16 rows
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
SHAPES = 64  # torch's default limit is eight compilations of a function


def without_repeats(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different prompts, and which of them each prompt is."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    return list(number), [number[tuple(prompt)] for prompt in prompts]


class Decoder:
    """Continues a batch of rows.

    Args:
        model: A causal language model in evaluation mode.
        pad: Any token id, to pad shorter prompts with.
    """

    def __init__(self, model: PreTrainedModel, pad: int = 0):
        self.model, self.pad = model, pad
        self.device = model.device  # which takes as long as a kernel to look up
        self.cpu_step = step_of(model)
        self.lengths: list[int] = []  # tokens of each row so far
        self.use(Frame(model.config, 0), [], torch.empty(0, dtype=torch.long, device=self.device))

    def use(self, frame: Frame, lengths: list[int], last: torch.Tensor) -> None:
        """Go on with a frame, the lengths of its rows and their last tokens (rows,)."""
        device, longest = self.device, max(lengths, default=0)
        self.frame, self.lengths, self.last = frame, lengths, last
        self.positions = torch.tensor(lengths, dtype=torch.long, device=device)[:, None]  # of the next tokens
        # The first column of each row, which stays the same while all rows grow; None if it is 0 for all
        self.starts = None if min(lengths, default=0) == longest else longest - self.positions

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        """Start with the rows of `prompts` alone; arguments and result as in `admit`."""
        return self.admit(prompts, max_new_tokens)

    def fits(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keep: Sequence[int]) -> bool:
        """Whether `admit` has room; it always has if nothing is kept."""
        return True

    def admit(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keep: Sequence[int] = ()) -> torch.Tensor:
        """Append rows to those in `keep`; logits (rows, V) of the new ones' ends. Equal prompts are fed once.

        Args:
            prompts: Token ids of each new row.
            max_new_tokens: Steps that follow at most.
            keep: Present rows that stay; all others leave.
        """
        distinct, rows = without_repeats(prompts)
        moves = bool(keep) or len(distinct) < len(rows)
        longest = max(map(len, prompts))
        fresh = Frame(self.model.config, longest if moves else longest + max_new_tokens)
        logits = self.feed_prompts(fresh, distinct)
        lengths = [self.lengths[row] for row in keep] + [len(prompt) for prompt in prompts]
        if moves:
            kept = [(self.frame, keep)] if keep else []
            fresh = arrange([*kept, (fresh, rows)], max(lengths), max(lengths) + max_new_tokens)
        ends = self.last.new_tensor([prompt[-1] for prompt in prompts])
        self.use(fresh, lengths, torch.cat([self.last[list(keep)], ends]))
        return logits[torch.tensor(rows, device=logits.device)] if len(distinct) < len(rows) else logits

    def feed_prompts(self, cache: Cache, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Fill a cache with prompts of any lengths, padded on the left; logits (rows, V) of their last tokens."""
        device, longest = self.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + list(row) for row in prompts], device=device)
        padding = torch.tensor([[longest - len(row)] for row in prompts], device=device)
        columns = torch.arange(longest, device=device)
        is_padded = any(len(row) < longest for row in prompts)
        mask = (columns >= padding).long() if is_padded else None
        logits = self.feed(self.model, cache, ids, (columns - padding).clamp(min=0), mask)
        if isinstance(cache, Frame):
            cache.length += longest
        return logits

    def step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Feed one token per row; logits (rows, V)."""
        if self.frame.length == self.frame.capacity:
            self.select(range(len(self.lengths)))
        ids = torch.as_tensor(tokens, device=self.device)
        if self.cpu_step is not None:
            logits = self.cpu_step(ids, self.last, self.positions, self.frame, self.step_mask())
        else:
            logits = self.feed(self.model, self.frame, ids[:, None], self.positions, self.step_mask())
        self.last = ids
        self.frame.length += 1
        self.lengths = [length + 1 for length in self.lengths]
        self.positions = self.positions + 1
        return logits

    def step_mask(self) -> Mask:
        """Which columns each row sees: (rows, 1, 1, columns) for sdpa, one per kind of layer if there are several.

        Built here, because transformers' mask functions take longer than a layer does. For other kernels they take
        over, from a mask (rows, columns). None where all rows see all columns.
        """
        end = self.frame.length + 1
        mask = None
        if self.starts is not None:
            mask = torch.arange(end, device=self.starts.device) >= self.starts
        if self.model.config._attn_implementation != "sdpa":
            return None if mask is None else mask.long()
        mask = None if mask is None else mask[:, None, None]
        if not self.frame.windows:
            return mask
        begins = {kind: max(0, end - window) if window else 0 for kind, window in self.frame.windows.items()}
        return {kind: None if mask is None else mask[..., begin:] for kind, begin in begins.items()}

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows`, in this order."""
        lengths = [self.lengths[row] for row in rows]
        room = max(self.frame.capacity - self.frame.length, max(lengths) // 4, SMALLEST_STEP)
        moved = arrange([(self.frame, rows)], max(lengths), max(lengths) + room)
        self.use(moved, lengths, self.last[list(rows)])

    def feed(
        self, forward: Any, cache: Cache, ids: torch.Tensor, position_ids: torch.Tensor, mask: Mask
    ) -> torch.Tensor:
        output = forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
        return output.logits[:, -1]


class PlacedLayer(StaticLayer):
    """Keys and values (rows, heads, columns, head_dim) of the compiled decoder.

    Full length in every layer: transformers' static windows count in Python integers, so each step would recompile.
    The masks still apply the windows. All layers share one counter, which the decoder advances.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, like: FrameLayer, rows: int, columns: int, counter: torch.Tensor):
        """Zeros with the heads, head_dim and dtype of `like`; `counter`: 0-d, the columns in use."""
        super().__init__(max_cache_len=columns)
        states = (like.keys, like.values)
        self.keys, self.values = (part.new_zeros(rows, part.shape[1], columns, part.shape[3]) for part in states)
        self.cumulative_length, self.device, self.is_initialized = counter, counter.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column (rows, heads, 1, head_dim)."""
        column = self.cumulative_length[None]
        self.keys.index_copy_(2, column, key_states)
        self.values.index_copy_(2, column, value_states)
        return self.keys, self.values


class CompiledDecoder(Decoder):
    """Decodes with a static cache and a step compiled to one graph per number of rows and cache length.

    The cache has as many rows as its first prompts. Rows that leave are computed on until others take their places.
    Lengths are rounded up to an eighth of a power of two, and an existing cache is reused while at most twice too
    long, so a growing chat compiles a handful of times. On CUDA the step is captured as a CUDA graph, which overwrites
    the logits of the previous step.
    """

    def __init__(self, model: PreTrainedModel, pad: int = 0):
        super().__init__(model, pad)
        options = CUDA_OPTIONS if model.device.type == "cuda" else CPU_OPTIONS
        self.compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, options=options)
        self.places: list[int] = []  # row of the cache, for each row
        self.length = 0  # columns in use
        self.allocate([], 0, 0)

    def allocate(self, like: Sequence[FrameLayer], rows: int, columns: int) -> None:
        """An empty cache, and the inputs of its steps, which stay where they are."""
        device = self.device
        self.shape = (rows, columns)
        self.counter = torch.zeros((), dtype=torch.long, device=device)  # `length`
        self.layers = [PlacedLayer(part, rows, columns, self.counter) for part in like]
        self.cache = Cache(layers=[*self.layers])
        self.ids = torch.full((rows, 1), self.pad, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.ones(rows, columns, dtype=torch.long, device=device)
        self.steps: dict[bool, Callable[[], torch.Tensor]] = {}  # with and without the mask

    def fits(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keep: Sequence[int]) -> bool:
        longest = max([self.lengths[row] for row in keep] + [len(prompt) for prompt in prompts])
        rows, columns = self.shape
        return not keep or (len(keep) + len(prompts) <= rows and longest + max_new_tokens <= columns)

    def admit(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keep: Sequence[int] = ()) -> torch.Tensor:
        distinct, rows = without_repeats(prompts)
        fresh = Frame(self.model.config, max(map(len, prompts)))
        logits = self.feed_prompts(fresh, distinct)
        lengths = [self.lengths[row] for row in keep] + [len(prompt) for prompt in prompts]
        if keep:
            self.move([self.places[row] for row in keep], max(lengths))
            taken = [self.places[row] for row in keep]
            free = [place for place in range(self.shape[0]) if place not in taken]
            self.places = taken + free[: len(prompts)]
        else:
            self.start(fresh, len(prompts), max(lengths) + max_new_tokens)
            self.places = list(range(len(prompts)))
        self.length = max(lengths)
        self.write(fresh, rows, self.places[len(keep) :])
        self.place(lengths)
        return logits[torch.tensor(rows, device=logits.device)]

    def start(self, fresh: Frame, rows: int, length: int) -> None:
        """An empty cache of this many rows and columns, with the memory of the present one if that suffices."""
        if self.shape[0] == rows and length <= self.shape[1] <= 2 * length:
            return  # what it holds is masked or overwritten
        step = max(SMALLEST_STEP, (1 << (length - 1).bit_length()) // 8)
        self.allocate(fresh.parts, rows, -(-length // step) * step)

    def move(self, places: Sequence[int], end: int) -> None:
        """Move the contents of some rows of the cache so that they end at another column."""
        width = min(self.length, end)
        for layer in self.layers if end != self.length else []:
            for states in (layer.keys, layer.values):
                kept = states[:, :, self.length - width : self.length].clone()
                states[places, :, end - width : end] = kept[places]

    def write(self, fresh: Frame, rows: Sequence[int], places: Sequence[int]) -> None:
        """Copy rows of new prompts to their places, ending at the last column in use."""
        for layer, source in zip(self.layers, fresh.parts, strict=True):
            layer.keys[places, :, self.length - fresh.length : self.length] = source.keys[rows, :, : fresh.length]
            layer.values[places, :, self.length - fresh.length : self.length] = source.values[rows, :, : fresh.length]

    def place(self, lengths: list[int]) -> None:
        """Set positions and mask of all rows of the cache; without a row of ours they are those of an empty one."""
        rows, columns = self.shape
        of_place = dict(zip(self.places, lengths, strict=True))
        self.lengths = lengths
        self.counter.fill_(self.length)
        self.positions.copy_(torch.tensor([of_place.get(place, 0) for place in range(rows)])[:, None])
        self.mask.copy_(torch.arange(columns, device=self.device) >= self.length - self.positions)
        # Even if no row is padded: without a mask the step would be another graph
        self.masked = rows > 1 or lengths != [self.length]
        self.index_of_places()

    def index_of_places(self) -> None:
        in_order = self.places == list(range(self.shape[0]))
        self.index = None if in_order else torch.tensor(self.places, device=self.device)

    def step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        ids = torch.as_tensor(tokens, device=self.device)[:, None]
        if self.index is None:
            self.ids.copy_(ids)
        else:
            self.ids.index_copy_(0, self.index, ids)
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            if self.masked not in self.steps:
                mask = self.mask if self.masked else None
                call = partial(self.feed, self.compiled, self.cache, self.ids, self.positions, mask)
                self.steps[self.masked] = captured(call, self.device)
            logits = self.steps[self.masked]()
        self.length += 1
        self.lengths = [length + 1 for length in self.lengths]
        self.counter += 1
        self.positions += 1
        return logits if self.index is None else logits[self.index]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only `rows`; the others' places are free."""
        self.places, self.lengths = [self.places[row] for row in rows], [self.lengths[row] for row in rows]
        self.index_of_places()
