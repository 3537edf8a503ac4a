"""NanoChat, the plain architecture.

Notable features:
- rotary embeddings, then RMSNorm on queries and keys (QK norm), no positional table
- RMSNorm without parameters, also directly after the token embedding
- ReLU squared in the MLP
- grouped-query attention, untied head, no biases
- logits softcapped by tanh, in float32

Weight names and values are those of transformers' own `NanoChatForCausalLM`: a folder saved here opens there. The
differences are the initialisation (the original's: zero output projections and head), the float32 softcap, and a
training loss that never materialises the logits of a full batch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanochat import NanoChatConfig
from .linear import is_only_a_weight, linear
from .softcapped_loss import IGNORED, softcapped_cross_entropy

FLOAT16_REFUSED = (
    "NanoChat does not run in float16: the squared ReLU overflows and the output becomes NaN; "
    "load it with dtype=torch.bfloat16 or torch.float32"
)


# Name of the key-value cache in transformers' calls and outputs: `past_key_values`, from 5.24 on `cache`. A forward
# pass accepts both.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# Keywords that a forward pass accepts beside its own arguments. Any other is an error: an argument that a newer
# transformers has renamed would otherwise be dropped silently.
EXTRA_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    "cache",
    # loss
    "ignore_index",
    "shift_labels",
    # servers that keep the cache in their attention functions
    "attention_instances",
    "forward_batch",
    # read by transformers' decorators
    "debug_io",
    "debug_io_dir",
    "prune_layers",
    "return_dict",
}


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for a keyword that neither the model nor an attention function knows.

    Not checked in continuous batching, whose cache is not a `Cache`: its own attention functions take keywords.
    """
    unknown = [name for name in kwargs if name not in EXTRA_KEYWORDS]  # torch 2.11 cannot compile set operators
    if unknown and isinstance(kwargs.get("cache"), Cache | None):
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")


def pop_cache(past_key_values: Cache | None, kwargs: dict[str, Any]) -> Cache | None:
    """The key-value cache under either name, removed from `kwargs`.

    Up to transformers 5.23 a `cache` that is not a `Cache` is continuous batching's. Its attention functions update
    it, so it stays in `kwargs`.
    """
    if CACHE != "cache" and not isinstance(kwargs.get("cache"), Cache):
        return past_key_values
    cache = kwargs.pop("cache", None)
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("give the key-value cache once, as cache or as past_key_values")
    return past_key_values if cache is None else cache


def only_causal(
    config: NanoChatConfig,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> bool:
    """Whether a full-attention layer needs no mask beyond sdpa's `is_causal=True`: no padding, documents or cache.

    transformers detects this in eager passes. Under torch.compile some versions of both build a dense mask instead,
    with which attention takes twice the FLOPs and a slower kernel. Given positions may hold packed documents:
    detecting them would synchronise with the device in eager passes and is impossible in compiled ones.
    """
    nothing_given = attention_mask is None and position_ids is None and cache is None
    maskless = config._attn_implementation in ("sdpa", "flex_attention")  # which falls back to sdpa, see `attend`
    return nothing_given and maskless and getattr(config, "is_causal", True)


def by_blocks(config: NanoChatConfig, attention_mask: torch.Tensor | None, cache: Cache | None) -> bool:
    """Whether [`block_mask`] covers everything to be masked: FlexAttention without padding and cache."""
    flexible = config._attn_implementation == "flex_attention" and getattr(config, "is_causal", True)
    return flexible and attention_mask is None and cache is None


def block_mask(inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None, window: int | None = None) -> BlockMask:
    """FlexAttention's mask: each token sees its own document up to itself, at most the last `window` tokens.

    transformers' own mask functions break a compiled graph: they set an argument that torch warns about.

    Args:
        inputs_embeds: (B, T, C).
        position_ids: (1 or B, T), restarting at each packed document; None: one document per row.
    """
    rows, length = inputs_embeds.shape[:2]
    begins = None  # (B, T): start of each token's document
    if position_ids is not None:
        begins = (torch.arange(length, device=position_ids.device) - position_ids).expand(rows, -1)

    def is_seen(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        return seen if begins is None else seen & (begins[row, query] == begins[row, key])

    return create_block_mask(is_seen, None if begins is None else rows, None, length, length, inputs_embeds.device)


def document_bounds(
    config: NanoChatConfig,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    inputs_embeds: torch.Tensor,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Keywords with the bounds of packed documents for flash attention, which takes no mask; empty for other kernels.

    transformers itself detects documents only in a batch of one row, and again in every layer.
    """
    if position_ids is None or attention_mask is not None or cache is not None or "cu_seq_lens_q" in kwargs:
        return {}
    if not is_flash_attention_requested(config):
        return {}
    rows, length = inputs_embeds.shape[:2]
    bounds = cumulative_lengths(position_ids.expand(rows, -1))
    # The longest document would have to be read from the device; the row's length is an upper bound.
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


@torch.compiler.disable
def cumulative_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) -> starts of the documents in the flattened rows, then B x T; int32 (documents + 1,)."""
    begins = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    bounds = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()
    torch._dynamo.mark_dynamic(bounds, 0)  # otherwise each number of documents would recompile the layers
    return bounds


class NanoChatRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32; no parameters."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class NanoChatRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles (arXiv 2104.09864), computed in float32 for the given positions."""

    inv_freq: torch.Tensor  # (head_dim / 2,)
    original_inv_freq: torch.Tensor

    def __init__(self, config: NanoChatConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        if self.rope_type != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return 1.0 / (self.config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` (B, T) -> cos, sin, each (B, T, head_dim), in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self.attention_scaling
        cos, sin = ((waves * scaling).to(x.dtype) for waves in (angles.cos(), angles.sin()))
        return computed_once(cos), computed_once(sin)


def computed_once(x: torch.Tensor) -> torch.Tensor:
    """`x`; the compiler would otherwise compute cosines and sines again in two kernels of every layer."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return x.as_strided(x.shape, x.stride())  # a view of memory, which must have been written
    return x


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` (B, T, heads, head_dim) by `cos`, `sin` (B, T, head_dim), by minus the usual angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (waves.unsqueeze(2)[..., : first.shape[-1]] for waves in (cos, sin))  # whose halves are equal
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention: (B, H, T, D) queries on (B, KV, S, D) keys and values -> (B, T, H, D) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


Layer = TypeVar("Layer", bound=nn.Module)


def init_as(kind: str, layer: Layer) -> Layer:
    """`layer`, marked for `_init_weights`. Only leaves are: transformers skips modules without own parameters."""
    vars(layer)["init_kind"] = kind
    return layer


class NanoChatAttention(nn.Module):
    """Causal grouped-query attention with rotary embeddings followed by RMSNorm on queries and keys."""

    def __init__(self, config: NanoChatConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = init_as("zeros", nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias))
        self.qk_norm = NanoChatRMSNorm(config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` (B, T, C) -> (B, T, C) and the attention weights, if the backend returns them."""
        return self.attend(*self.project(hidden_states), **kwargs)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, T, H x head_dim), keys and values (B, T, KV x head_dim)."""
        query, key, value = [linear(layer, hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return query, key, value

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries (B, T, H x head_dim), keys and values (B, T, KV x head_dim) -> (B, T, C) and the weights."""
        shape = (*query.shape[:-1], -1, self.head_dim)
        query, key = (self.qk_norm(apply_rotary(part.view(shape), *position_embeddings)) for part in (query, key))
        # Transposed last: attention's output has its queries' layout, and is then contiguous as (B, T, H, D)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value.view(shape)))
        cache = pop_cache(past_key_values, kwargs)
        if cache is not None:  # a paged cache also adds its attention functions' arguments to `kwargs`
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        implementation = self.config._attn_implementation
        if implementation == "flex_attention" and attention_mask is None:
            implementation = "sdpa"  # purely causal, where sdpa is faster; FlexAttention would see all keys
        backend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = backend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return linear(self.o_proj, output.reshape(*output.shape[:2], -1)), weights


class NanoChatMLP(nn.Module):
    """Linear, ReLU squared, linear."""

    def __init__(self, config: NanoChatConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = init_as("zeros", nn.Linear(config.intermediate_size, config.hidden_size, bias=False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C). Of the inner width training saves only `fc1`'s output; it recomputes the rest."""
        inner = linear(self.fc1, hidden_states)
        needs_gradient = self.training and torch.is_grad_enabled()
        if needs_gradient and torch.compiler.is_compiling():  # not `fc2`: a compiler might recompute its product too
            return self.fc2(checkpoint(self.activation_fn, inner, use_reentrant=False))
        if needs_gradient and type(self.fc2) is nn.Linear:  # recomputation stops once `fc2` has saved its input
            return checkpoint(self.contract, inner, use_reentrant=False)
        return self.contract(inner)

    def contract(self, inner: torch.Tensor) -> torch.Tensor:
        return linear(self.fc2, self.activation_fn(inner))


class NanoChatDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    attention_class: type[NanoChatAttention] = NanoChatAttention

    def __init__(self, config: NanoChatConfig, layer_idx: int):
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = NanoChatMLP(config)
        self.norm = NanoChatRMSNorm(config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm(hidden_states))


class NanoChatPreTrainedModel(PreTrainedModel):
    """Base of both model classes: capabilities, and the original's initialisation."""

    config: NanoChatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoChatDecoderLayer, "attentions": NanoChatAttention}

    def __init__(self, config: NanoChatConfig, *args, **kwargs):
        if config.dtype == torch.float16:
            raise ValueError(FLOAT16_REFUSED)
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """The original's scheme."""
        if isinstance(module, nn.Linear):
            if getattr(module, "init_kind", None) == "zeros":
                init.zeros_(module.weight)
            else:
                fan_out, fan_in = module.out_features, module.in_features
                init.normal_(module.weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, NanoChatRotaryEmbedding):  # buffers are lost when a model is built on the meta device
            inv_freq, module.attention_scaling = module.frequencies()
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)


class NanoChatModel(NanoChatPreTrainedModel):
    """The decoder without the head: token ids to hidden states."""

    layer_class: type[NanoChatDecoderLayer] = NanoChatDecoderLayer

    def __init__(self, config: NanoChatConfig):
        super().__init__(config)
        self.build()
        self.post_init()

    def build(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = NanoChatRMSNorm(config.rms_norm_eps)
        self.rotary_emb = NanoChatRotaryEmbedding(config)
        self.gradient_checkpointing = False

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C) after the last norm.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, C) in their place.
            attention_mask: (B, S) with 0 for padding, a prepared mask, or None.
            position_ids: (B, T). Restarting at 0 inside a row separates packed documents; needs `attention_mask=None`
                and `use_cache=False`.
            kwargs: `cache`, the newer name of `past_key_values`; and [`EXTRA_KEYWORDS`].

        Raises:
            TypeError: An unknown keyword.
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, or two caches.
        """
        check_keywords(kwargs)
        cache = pop_cache(past_key_values, kwargs)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        named_cache: dict[str, Any] = {CACHE: cache}
        causal_mask: torch.Tensor | BlockMask | None = None
        if only_causal(self.config, attention_mask, position_ids, cache):
            pass
        elif by_blocks(self.config, attention_mask, cache):
            causal_mask = block_mask(inputs_embeds, position_ids)
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,  # only if given: transformers searches them for packed documents
                **named_cache,
            )
        kwargs |= document_bounds(self.config, attention_mask, position_ids, cache, inputs_embeds, kwargs)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = self.norm(inputs_embeds)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer when drafting by early exit
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                **named_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named_cache)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, C); under autocast in its dtype, as in the original, and so is the residual stream."""
        embedded = self.embed_tokens(input_ids)
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
        if embedded.dtype == torch.float16:
            raise ValueError(FLOAT16_REFUSED)
        return embedded


class NanoChatForCausalLM(NanoChatPreTrainedModel, GenerationMixin):
    """NanoChat with its language-model head."""

    model_class: type[NanoChatModel] = NanoChatModel

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # annotated as tuples of str

    def __init__(self, config: NanoChatConfig):
        super().__init__(config)
        self.build()
        self.post_init()

    def build(self) -> None:
        self.model = self.model_class(self.config)
        self.vocab_size = self.config.vocab_size
        self.lm_head = init_as("zeros", nn.Linear(self.config.hidden_size, self.vocab_size, bias=False))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in float32, softcapped; with `labels` (B, T; -100 = ignored, shifted inside) also the loss.

        Args:
            logits_to_keep: Only the last n positions, or the positions in this index tensor; 0 keeps all.
            skip_logits: Compute only the loss, in chunks, and return no logits. Default: when training with labels.
            kwargs: `shift_labels` (B, T) in place of `labels`: the target of each position, so that all T positions
                are trained on (not a named argument, or transformers' Trainer would expect it in every batch).
                `num_items_in_batch` divides the summed loss in place of the number of labels in this batch.
        """
        cache = pop_cache(past_key_values, kwargs)
        shift_labels = kwargs.pop("shift_labels", None)
        shift_labels = None if shift_labels is None else shift_labels.contiguous()  # slices too; the loss views it
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        # written out because `slice_logits_to_keep` is missing in the oldest supported transformers
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept, :]
        loss = logits = None
        has_labels = labels is not None or shift_labels is not None
        if has_labels and (self.training if skip_logits is None else skip_logits) and is_only_a_weight(self.lm_head):
            loss = self.chunked_loss(hidden_states, labels, shift_labels, **kwargs)
        else:
            logits = self.softcap(linear(self.lm_head, hidden_states))
            if has_labels:
                loss = self.loss_function(logits, labels, self.vocab_size, shift_labels=shift_labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def chunked_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None = None,
        ignore_index: int = IGNORED,
        **kwargs,
    ) -> torch.Tensor:
        """The loss of `loss_function`, without materialising the logits."""
        if shift_labels is None:
            assert labels is not None, "one of labels and shift_labels is given"
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(hidden_states.device)
        softcap = self.config.final_logit_softcapping
        total = softcapped_cross_entropy(hidden_states, self.lm_head.weight, shift_labels, softcap, ignore_index)
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def softcap(self, logits: torch.Tensor) -> torch.Tensor:
        """cap * tanh(logits / cap), after the cast to float32: tanh in bfloat16 loses digits that the loss needs."""
        cap = self.config.final_logit_softcapping
        return logits.float() if cap is None else cap * torch.tanh(logits.float() / cap)
