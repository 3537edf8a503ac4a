"""A stand-in for the package of flash attention: the same functions, written out for a CPU."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils


def install_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find the stand-in as `flash_attention_3`."""
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    modeling_flash_attention_utils.lazy_import_flash_attention("flash_attention_3")


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """(tokens, heads, head_dim) of documents one after another, the windows by tokens before and after."""
    tokens = torch.arange(len(q))
    document = torch.searchsorted(cu_seqlens_q, tokens.int(), right=True)
    distance = tokens[:, None] - tokens
    seen = (document[:, None] == document) & ((distance >= 0) | (not causal))
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    rows, length = q.shape[:2]
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    joined = [part.flatten(0, 1) for part in (q, k, v)]
    attended = flash_attn_varlen_func(*joined, bounds, bounds, length, length, softmax_scale, causal, window_size)
    return attended.unflatten(0, (rows, length))
