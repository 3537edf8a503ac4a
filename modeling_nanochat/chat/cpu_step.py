"""A decoding step of NanoChat on a CPU, in few kernels.

With one token per row, Python and the dispatch of small kernels take longer in a forward pass than reading a small
model's weights does. Here queries, keys and values are one product, queries and keys are rotated and normalized
together, rotary angles are looked up, and turbo is given the previous tokens, so it need not recall them from the
cache. The logits differ from those of the forward pass by rounding only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..linear import in_parts, is_only_a_weight, product
from ..modeling_nanochat import NanoChatForCausalLM
from ..modeling_nanochat_turbo import (
    SMEAR_GATE_CHANNELS,
    VALUE_GATE_CHANNELS,
    VALUE_GATE_RANGE,
    NanoChatTurboForCausalLM,
)
from .frame import Frame, FrameLayer

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines, each (R, 1, 1, head_dim)
ANGLES = 256  # positions whose angles are computed at first


class CpuStep:
    """Feeds one token per row to a plain model for which `step_of` has chosen it. Shapes: R rows, C channels."""

    def __init__(self, model: Any):
        self.model, self.decoder, self.config = model, model.model, model.config
        self.layers = [LayerStep(layer) for layer in self.decoder.layers[: self.config.num_hidden_layers]]
        self.head = in_parts(model.lm_head.weight)
        self.eps = torch.tensor(self.config.rms_norm_eps)
        self.cos, self.sin = self.angles(ANGLES)

    def __call__(
        self,
        ids: torch.Tensor,
        previous: torch.Tensor,
        positions: torch.Tensor,
        frame: Frame,
        mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
    ) -> torch.Tensor:
        """Write the tokens' keys and values to the frame's next column; returns logits (R, V).

        Args:
            ids, previous: (R,), the tokens to feed, and those before them.
            positions: (R, 1), of `ids`.
            frame: The cache, whose `length` the caller increases.
            mask: See `Decoder.step_mask`.

        Raises:
            RuntimeError: The forward pass over the prompts has not filled the frame.
        """
        if not all(part.is_initialized for part in frame.parts):
            raise RuntimeError("the model has left the cache empty")
        if frame.length >= self.cos.size(0):  # the largest position
            self.cos, self.sin = self.angles(2 * frame.length)
        rotation = F.embedding(positions, self.cos)[:, None], F.embedding(positions, self.sin)[:, None]
        stream = self.through_layers(ids, previous, rotation, frame, mask)
        return self.model.softcap(product(self.head, rms_norm(stream, self.eps)))

    def angles(self, count: int) -> Rotation:
        """Cosines and signed sines (count, head_dim) of the first positions."""
        cos, sin = self.decoder.rotary_emb(self.eps, torch.arange(count)[None])
        first, second = sin[0].chunk(2, -1)
        return cos[0], torch.cat((first, -second), -1)

    def through_layers(
        self, ids: torch.Tensor, previous: torch.Tensor, rotation: Rotation, frame: Frame, mask: Any
    ) -> torch.Tensor:
        """The residual stream (R, C) after the last layer."""
        stream = self.embed(ids)
        for layer, part in zip(self.layers, frame.parts, strict=True):
            stream = layer(stream, rotation, part, mask)
        return stream

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (..., R) -> normed embeddings (..., R, C)."""
        return rms_norm(F.embedding(ids, self.decoder.embed_tokens.weight), self.eps)


class TurboCpuStep(CpuStep):
    """[`CpuStep`] for a turbo model."""

    def through_layers(
        self, ids: torch.Tensor, previous: torch.Tensor, rotation: Rotation, frame: Frame, mask: Any
    ) -> torch.Tensor:
        decoder = self.decoder
        stream = start = self.smear(*self.embed(torch.stack((ids, previous))))
        halfway = stream
        kept, added = decoder.resid_lambdas.unbind(), decoder.x0_lambdas.unbind()
        for i, layer in enumerate(self.layers):
            table = decoder.value_embeds[str(i)].weight if str(i) in decoder.value_embeds else None
            embeds = None if table is None else F.embedding(ids, table)
            part_mask = mask[layer.attention.layer_type] if isinstance(mask, dict) else mask
            stream = torch.addcmul(stream * kept[i], start, added[i])
            stream = layer(stream, rotation, frame.parts[i], part_mask, embeds)
            if i == len(self.layers) // 2:
                halfway = stream
        return torch.addcmul(stream, halfway, decoder.backout_lambda, value=-1)

    def smear(self, normed: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Without a case for a row's first token, which is always part of its prompt."""
        gate = torch.sigmoid(F.linear(normed[:, :SMEAR_GATE_CHANNELS], self.decoder.smear_gate.weight))
        return torch.addcmul(normed, self.decoder.smear_lambda * gate, previous)


class LayerStep:
    """One layer's part of the step."""

    def __init__(self, layer: Any):
        attention = self.attention = layer.self_attn
        self.head_dim = attention.head_dim
        self.qkv = in_parts(
            torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        )
        self.o, self.fc1 = in_parts(attention.o_proj.weight), in_parts(layer.mlp.fc1.weight)
        self.fc2 = in_parts(layer.mlp.fc2.weight)
        self.queries = attention.q_proj.out_features // self.head_dim
        self.keys = self.queries + attention.k_proj.out_features // self.head_dim  # the first head that is a value
        self.is_grouped = self.attention.num_key_value_groups > 1
        self.eps = torch.tensor(layer.norm.eps)

    def __call__(
        self,
        stream: torch.Tensor,
        rotation: Rotation,
        part: FrameLayer,
        mask: torch.Tensor | None,
        value_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The residual stream (R, C) after the layer; `value_embeds` (R, KV x head_dim)."""
        stream = stream + self.attend(rms_norm(stream, self.eps), rotation, part, mask, value_embeds)
        inner = product(self.fc1, rms_norm(stream, self.eps)).relu_()
        return stream + product(self.fc2, inner * inner)

    def attend(
        self,
        normed: torch.Tensor,
        rotation: Rotation,
        part: FrameLayer,
        mask: torch.Tensor | None,
        value_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        heads = product(self.qkv, normed).reshape(normed.size(0), -1, 1, self.head_dim)
        rotated, value = self.rotate(heads[:, : self.keys], *rotation), heads[:, self.keys :]
        if value_embeds is not None:
            value = torch.addcmul(value, self.gate(normed), value_embeds.view_as(value), value=VALUE_GATE_RANGE)
        keys, values = part.update(rotated[:, self.queries :], value)
        attended = F.scaled_dot_product_attention(
            rotated[:, : self.queries], keys, values, mask, scale=self.attention.scaling, enable_gqa=self.is_grouped
        )
        return product(self.o, attended.reshape(normed.size(0), -1))

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        """Rotate and normalize heads (R, H, 1, head_dim)."""
        return rms_norm(torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), signed_sin), self.eps)

    def gate(self, normed: torch.Tensor) -> torch.Tensor:
        """Share of the value embeddings, (R, KV, 1, 1)."""
        gate = torch.sigmoid(F.linear(normed[:, :VALUE_GATE_CHANNELS], self.attention.ve_gate.weight))
        return gate[..., None, None]


def rms_norm(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    return x * torch.add(eps, torch.linalg.vecdot(x, x).unsqueeze(-1), alpha=1 / x.size(-1)).rsqrt_()


def step_of(model: PreTrainedModel) -> CpuStep | None:
    """The step for a model in float32 on a CPU; None for any other, and if something in it has been replaced."""
    kinds: dict[type, type[CpuStep]] = {NanoChatForCausalLM: CpuStep, NanoChatTurboForCausalLM: TurboCpuStep}
    step = kinds.get(type(model))
    return step(model) if step is not None and is_as_built(model) else None


def is_as_built(model: PreTrainedModel) -> bool:
    """Whether a NanoChat model computes what its classes say: no adapters, hooks, quantizers, shards or autocast."""
    on_cpu = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in model.parameters())
    usual = model.config._attn_implementation == "sdpa" and model.config.hidden_act == "relu2"
    fixed = model.config.rope_parameters["rope_type"] not in (
        "dynamic",
        "longrope",
    )  # angles depend on the position only
    plain_math = usual and fixed and not torch.is_autocast_enabled("cpu")
    return on_cpu and plain_math and all(is_own(module) for module in model.modules())


def is_own(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return is_only_a_weight(module)
    own = type(module).__module__.partition(".")[0] in (__package__.partition(".")[0], "transformers")
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return not hooked and (own or type(module) in (nn.Embedding, nn.ModuleList, nn.ModuleDict))
