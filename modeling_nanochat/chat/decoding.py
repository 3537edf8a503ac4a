"""Decoding of a batch: prompts first, then one token per row and step.

[`Decoder`] has a growing cache and drops finished rows. [`CompiledDecoder`] has a fixed-size cache and a compiled
step: it starts half a minute later and then runs faster, so it suits long chats, many questions and measurements.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..modeling_nanochat import CACHE

SMALLEST_STEP = 64
# A step takes a few milliseconds, so Python's overhead around kernels matters; on a CPU so do the kernels for narrow
# products, for which Inductor's are benchmarked against the BLAS library's at compile time.
CUDA_OPTIONS: dict[str, Any] = {"triton.cudagraphs": True}
CPU_OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "epilogue_fusion": False,  # torch 2.13 fails to fuse into its own kernels for turbo at 16 rows
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
SHAPES = 64  # torch's default limit is eight compilations of a function


class Decoder:
    """Continues a batch of rows.

    Args:
        model: A causal language model in evaluation mode.
        pad: Any token id, to pad shorter prompts with.
    """

    def __init__(self, model: PreTrainedModel, pad: int = 0):
        self.model = model
        self.pad = pad
        self.one_token: Callable = model
        self.cache: Cache  # set by `prefill`, as are the positions
        self.attention_mask: torch.Tensor | None = None  # (rows, length), None while no row is padded
        self.position_ids: torch.Tensor  # (rows, 1), of the next token

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        """Feed prompts of different lengths, padded on the left; logits (rows, V) of their last positions.

        Args:
            prompts: Token ids of each row.
            max_new_tokens: Maximum number of steps that follow.
        """
        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + list(row) for row in prompts], device=device)
        lengths = torch.tensor([len(row) for row in prompts], device=device)
        columns = torch.arange(longest, device=device)
        padding = (longest - lengths)[:, None]
        self.cache = self.new_cache(len(prompts), longest + max_new_tokens)
        self.attention_mask = (columns >= padding).long() if lengths.min() < longest else None
        self.position_ids = (columns - padding).clamp(min=0)
        logits = self.feed(self.model, ids)
        self.position_ids = lengths[:, None]
        return logits

    def step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Feed one token per row; logits (rows, V)."""
        ids = torch.as_tensor(tokens, device=self.model.device)[:, None]
        self.widen_mask(ids)
        logits = self.feed(self.one_token, ids)
        self.position_ids = self.position_ids + 1
        return logits

    def select(self, rows: list[int]) -> bool:
        """Keep only `rows`; False if this decoder cannot drop rows."""
        indices = torch.tensor(rows, device=self.position_ids.device)
        self.cache.batch_select_indices(indices)
        self.position_ids = self.position_ids[indices]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[indices]
        return True

    def new_cache(self, rows: int, length: int) -> Cache:
        return DynamicCache(config=self.model.config)

    def widen_mask(self, ids: torch.Tensor) -> None:
        if self.attention_mask is not None:
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(ids)], dim=1)

    def feed(self, forward: Callable, ids: torch.Tensor) -> torch.Tensor:
        output = forward(
            input_ids=ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache},
        )
        return output.logits[:, -1]


class CompiledDecoder(Decoder):
    """Decodes with a static cache and a step compiled to one graph per number of rows and cache length.

    Lengths are rounded up to an eighth of a power of two, and an existing cache is reused while at most twice too
    long, so a growing chat compiles a handful of times. On CUDA the step is also captured as a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, pad: int = 0):
        super().__init__(model, pad)
        options = CUDA_OPTIONS if model.device.type == "cuda" else CPU_OPTIONS
        self.compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, options=options)
        self.one_token = self.compiled_forward
        self.shape = (0, 0)  # rows and length of the cache

    def new_cache(self, rows: int, length: int) -> Cache:
        if self.shape[0] == rows and length <= self.shape[1] <= 2 * length:
            self.cache.reset()  # keeps its memory, which captured graphs require
            return self.cache
        step = max(SMALLEST_STEP, (1 << (length - 1).bit_length()) // 8)
        length = -(-length // step) * step
        self.shape = (rows, length)
        # Full length in every layer: transformers' static windows count in Python integers, so each step would
        # recompile. The masks still apply the windows.
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        return Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(layers)])

    def select(self, rows: list[int]) -> bool:
        return False

    def widen_mask(self, ids: torch.Tensor) -> None:
        """Once, to the cache's length; batches without padding get one too, or they would compile another graph."""
        rows, length = self.shape
        if self.attention_mask is None and rows > 1:
            self.attention_mask = torch.ones((rows, 1), dtype=torch.long, device=ids.device)
        if self.attention_mask is not None and self.attention_mask.shape[1] < length:
            missing = length - self.attention_mask.shape[1]
            self.attention_mask = torch.nn.functional.pad(self.attention_mask, (0, missing), value=1)

    def compiled_forward(self, **inputs) -> CausalLMOutputWithPast:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return self.compiled(**inputs)
