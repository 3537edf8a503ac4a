"""NanoChat, the turbo architecture: reaches a given loss with less compute than the plain one.

Notable features, beside those of the plain architecture:
- sliding windows on a tiled pattern (short, short, short, long)
- value embeddings: every second layer adds an embedding of the token to its values, gated by the layer's input
- each layer's input is the residual stream plus the token embedding, both with learned scales
- smear: each token's embedding mixes in a little of the previous token's
- backout: a share of the residual stream at half depth is subtracted before the last norm
- sharper attention (queries and keys scaled by 1.2), rotary base 100,000

Ideas from the modded-nanogpt speedrun, in nanochat's form.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanochat_turbo import NanoChatTurboConfig
from .modeling_nanochat import (
    CACHE,
    NanoChatAttention,
    NanoChatDecoderLayer,
    NanoChatForCausalLM,
    NanoChatModel,
    NanoChatPreTrainedModel,
    block_mask,
    by_blocks,
    check_keywords,
    document_bounds,
    eager_attention_forward,
    init_as,
    only_causal,
    pop_cache,
)

VALUE_GATE_CHANNELS = 12
VALUE_GATE_RANGE = 3.0
SMEAR_GATE_CHANNELS = 24
DIGIT_BITS = 8  # integers up to 2^8 are exact in bfloat16
DIGITS = 3
OUTSIDE_CACHES = ("attention_instances", "forward_batch")  # arguments of vLLM's and SGLang's attention functions


class NanoChatTurboAttention(NanoChatAttention):
    """Plain attention with a window, a sharper scale, and value embeddings where the layer has them."""

    def __init__(self, config: NanoChatTurboConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling = config.qk_scale**2 / self.head_dim**0.5  # queries and keys are both scaled
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        if layer_idx in config.value_embedding_layers:
            gate = nn.Linear(VALUE_GATE_CHANNELS, config.num_key_value_heads, bias=False)
            self.ve_gate = init_as("gate", gate)

    def forward(
        self, hidden_states: torch.Tensor, value_embeds: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` (B, T, C), `value_embeds` (B, T, KV x head_dim) or None -> (B, T, C), weights."""
        query, key, value = self.project(hidden_states)
        if value_embeds is not None:
            gate = VALUE_GATE_RANGE * torch.sigmoid(self.ve_gate(hidden_states[..., :VALUE_GATE_CHANNELS]))
            value = value + (gate[..., None] * value_embeds.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return self.attend(query, key, value, sliding_window=self.sliding_window, **kwargs)


class NanoChatTurboDecoderLayer(NanoChatDecoderLayer):
    attention_class = NanoChatTurboAttention

    def __init__(self, config: NanoChatTurboConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        init_as("inner", self.mlp.fc1)


class NanoChatTurboMemory(nn.Module):
    """Recalls the previous token of each token from the cache: an attention head that looks one position back.

    Smear needs the previous token, which in cached decoding is not among the inputs. The keys are sinusoidal codes of
    the positions; the query is the code of the previous position, scaled so that the softmax is exactly one-hot; the
    values are the token ids in three digits. It is one more layer of whatever cache is in use, so padding, beams,
    chunks, static and paged caches need no code of their own. No parameters.
    """

    def __init__(self, config: NanoChatTurboConfig):
        super().__init__()
        self.config = config
        self.layer_idx = config.num_hidden_layers
        self.layer_type = config.smear_layer_type
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        self.num_key_value_groups = 1
        self.is_causal = True
        self.heads = config.num_key_value_heads
        self.head_dim = config.dim_of_heads
        # The runner-up scores 1.2 % (head_dim 8), 14 % (16), at least 35 % (from 32) below the previous position.
        self.scaling = 8192 / (self.head_dim // 2)

    def position_codes(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions (B, T) -> sinusoidal codes (B, T, head_dim) of equal length, far apart from each other."""
        waves = self.head_dim // 2
        slowest = 0.5 if waves >= 16 else 0.001
        exponents = torch.arange(waves, device=positions.device, dtype=torch.float32) / max(waves - 1, 1)
        angles = positions[..., None].float() * 3.0 * (slowest / 3.0) ** exponents
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def expand_to_heads(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B, T, head_dim) -> (B, heads, T, head_dim), the same for every head."""
        return rows.to(dtype).unsqueeze(1).expand(-1, self.heads, -1, -1)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        dtype: torch.dtype,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Token ids and positions (B, T) -> the previous tokens' ids (B, T); arbitrary for a first token.

        Raises:
            ValueError: A quantized cache, which would round the ids.
        """
        cache = pop_cache(past_key_values, kwargs)
        if isinstance(cache, QuantizedCache):
            raise ValueError(
                "turbo keeps token ids in its cache, which a quantized cache would round; use another cache"
            )
        shifts = DIGIT_BITS * torch.arange(DIGITS, device=input_ids.device)
        digits = (input_ids[..., None] >> shifts) & (2**DIGIT_BITS - 1)
        value = self.expand_to_heads(F.pad(digits, (0, self.head_dim - DIGITS)), dtype)
        position_ids = position_ids.expand_as(input_ids)
        query = self.expand_to_heads(self.position_codes(position_ids - 1), dtype)
        key = self.expand_to_heads(self.position_codes(position_ids), dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        window = {"sliding_window": self.sliding_window}
        recalled, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **window, **kwargs)
        recalled = recalled.reshape(*input_ids.shape, -1)[..., :DIGITS].float().round().long()
        return (recalled << shifts).sum(-1).clamp(0, self.config.vocab_size - 1)


class NanoChatTurboPreTrainedModel(NanoChatPreTrainedModel):
    """Capabilities as in the plain architecture; the original's initialisation of turbo."""

    config: NanoChatTurboConfig
    _no_split_modules = ["NanoChatTurboDecoderLayer"]
    _can_record_outputs = {"hidden_states": NanoChatTurboDecoderLayer, "attentions": NanoChatTurboAttention}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            self.init_matrix(module)
        elif isinstance(module, NanoChatTurboModel):
            self.init_scales(module)
        else:
            super()._init_weights(module)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)

    def init_matrix(self, layer: nn.Linear | nn.Embedding) -> None:
        kind = getattr(layer, "init_kind", None)
        if kind == "zeros":
            init.zeros_(layer.weight)
        elif kind == "head":
            init.normal_(layer.weight, std=0.001)
        elif kind == "gate":
            init.uniform_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.Embedding) and kind != "value":
            init.normal_(layer.weight, std=0.8)
        else:
            bound = 3**0.5 * self.config.hidden_size**-0.5  # uniform, with a standard deviation of 1 / sqrt(C)
            gain = 0.4 if kind == "inner" else 1.0
            init.uniform_(layer.weight, -gain * bound, gain * bound)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save as usual; `auto_map` also names the model without head, which vLLM looks for."""
        self.config.auto_map = {"AutoModel": "modeling_nanochat_turbo.NanoChatTurboModel"}
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize as usual; the value embeddings have a row per token too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        model = self.base_model
        assert isinstance(model, NanoChatTurboModel)
        model.resize_value_embeddings(embeddings.num_embeddings)
        return embeddings

    @staticmethod
    def init_scales(model: "NanoChatTurboModel") -> None:
        layers = len(model.layers)
        ramp = torch.arange(layers, dtype=torch.float32) / max(layers - 1, 1)
        init.copy_(model.resid_lambdas, 1.15 - 0.10 * ramp)
        init.copy_(model.x0_lambdas, 0.20 - 0.15 * ramp)
        init.zeros_(model.smear_lambda)
        init.constant_(model.backout_lambda, 0.2)


class NanoChatTurboModel(NanoChatTurboPreTrainedModel, NanoChatModel):
    """The decoder without the head: token ids to hidden states."""

    layer_class = NanoChatTurboDecoderLayer

    def build(self) -> None:
        super().build()
        config = self.config
        values = config.num_key_value_heads * config.dim_of_heads
        self.value_embeds = nn.ModuleDict(
            {str(i): init_as("value", nn.Embedding(config.vocab_size, values)) for i in config.value_embedding_layers}
        )
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.smear_gate = init_as("gate", nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False))
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.memory = NanoChatTurboMemory(config)

    def resize_value_embeddings(self, tokens: int) -> None:
        table: Any  # torch's containers have no types of their items
        for name, table in list(self.value_embeds.items()):
            resized = nn.Embedding(tokens, table.embedding_dim, device=table.weight.device, dtype=table.weight.dtype)
            self._init_weights(init_as("value", resized))
            kept = min(tokens, table.num_embeddings)
            resized.weight.data[:kept] = table.weight.data[:kept]
            self.value_embeds[name] = resized

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C) after the last norm; arguments as in [`NanoChatModel.forward`].

        Raises:
            TypeError: An unknown keyword.
            ValueError: `inputs_embeds` alone (value embeddings and smear read token ids), drafting by early exit, or
                an engine that keeps the cache outside the model.
        """
        check_keywords(kwargs)
        if any(name in kwargs for name in OUTSIDE_CACHES):
            raise ValueError(
                "turbo keeps previous tokens in the model's own cache, and an engine that keeps the cache in its "
                "attention functions would return another request's: serve it with transformers, or train plain"
            )
        cache = pop_cache(past_key_values, kwargs)
        if self.config.num_hidden_layers != len(self.layers):
            raise ValueError("turbo cannot draft by early exit: its last layers subtract what the middle ones added")
        if input_ids is None:
            raise ValueError("give input_ids: value embeddings and smear read token ids, not inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        masks = self.masks(inputs_embeds, attention_mask, cache, position_ids)
        kwargs |= document_bounds(self.config, attention_mask, position_ids, cache, inputs_embeds, kwargs)
        if position_ids is None:
            position_ids = self.positions(inputs_embeds, attention_mask, cache)
        named_cache: dict[str, Any] = {CACHE: cache}
        shared = {**named_cache, **kwargs}

        normed = self.norm(inputs_embeds)
        previous = self.previous(normed, input_ids, masks, position_ids, **shared)
        hidden_states = x0 = self.smear(normed, previous, position_ids)
        rotary = self.rotary_emb(hidden_states, position_ids)
        halfway = hidden_states
        layer: Any  # torch's containers have no types of their items
        for i, layer in enumerate(self.layers):
            hidden_states = layer(
                self.resid_lambdas[i] * hidden_states + self.x0_lambdas[i] * x0,
                attention_mask=masks[layer.self_attn.layer_type],
                position_embeddings=rotary,
                value_embeds=self.value_embeds[str(i)](input_ids).to(x0.dtype)
                if str(i) in self.value_embeds
                else None,
                **shared,
            )
            if i == len(self.layers) // 2:
                halfway = hidden_states
        # A tensor of shape (1,), unlike the scalars above, would promote the stream to its own dtype.
        backout = self.backout_lambda.to(hidden_states.dtype)
        hidden_states = self.norm(hidden_states - backout * halfway)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **named_cache)

    @staticmethod
    def positions(
        inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | dict[str, torch.Tensor] | None, cache: Cache | None
    ) -> torch.Tensor:
        """Positions (B, T) counted from the first token after padding, which smear treats as a document's first."""
        seen = cache.get_seq_length() if cache is not None else 0
        columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, columns]
        return columns.unsqueeze(0)

    def masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> Mapping[str, torch.Tensor | BlockMask | None]:
        """One mask per layer type; `generate` with a static cache and continuous batching pass prepared masks.

        `position_ids` as given by the caller, or None: see [`only_causal`].
        """
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
        }
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        windows = {"full_attention": None, "sliding_attention": self.config.sliding_window}
        blocks = by_blocks(self.config, attention_mask, cache)
        causal = only_causal(self.config, attention_mask, position_ids, cache)
        masks: dict[str, torch.Tensor | BlockMask | None] = {}
        for kind in dict.fromkeys(self.config.layer_types):
            window = windows[kind]
            # Compare lengths in training only: it would specialise an exported or dynamically compiled model to one.
            if causal and (window is None or (self.training and inputs_embeds.shape[1] <= window)):
                masks[kind] = None
            elif blocks:
                masks[kind] = block_mask(inputs_embeds, position_ids, window)
            else:
                masks[kind] = make[kind](**arguments)
        return masks

    def previous(
        self,
        normed: torch.Tensor,
        input_ids: torch.Tensor,
        masks: Mapping[str, torch.Tensor | BlockMask | None],
        position_ids: torch.Tensor,
        **kwargs,
    ) -> torch.Tensor:
        """Normed embeddings (B, T, C) of the previous tokens: shifted, or recalled from the cache if there is one."""
        if kwargs.get(CACHE) is None and kwargs.get("cache") is None:  # up to 5.23 continuous batching's
            return F.pad(normed[:, :-1], (0, 0, 1, 0))
        mask = masks[self.memory.layer_type]
        ids = self.memory(input_ids, position_ids, normed.dtype, mask, **kwargs)
        return self.norm(self.embed(ids))

    def smear(self, normed: torch.Tensor, previous: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """x_t + scale * sigmoid(gate(x_t)) * x_(t-1); the first token of a document is unchanged."""
        gate = torch.sigmoid(self.smear_gate(normed[..., :SMEAR_GATE_CHANNELS])) * (position_ids > 0)[..., None]
        return normed + (self.smear_lambda * gate).to(normed.dtype) * previous


class NanoChatTurboForCausalLM(NanoChatTurboPreTrainedModel, NanoChatForCausalLM):
    """Turbo NanoChat with its language-model head."""

    model_class = NanoChatTurboModel

    def build(self) -> None:
        super().build()
        init_as("head", self.lm_head)
