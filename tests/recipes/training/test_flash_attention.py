"""Flash attention through transformers, with its package replaced by the same functions written out, for a CPU."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from transformers import modeling_flash_attention_utils

IDS = torch.arange(64).reshape(2, 32)
# Two rows of packed documents, of which a row of 32 holds one to four.
PACKED = [
    torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    for rows in ([[20, 12], [32]], [[5, 9, 18], [1, 31]], [[16, 16], [30, 2]], [[3, 3, 3, 23], [8, 8, 8, 8]])
]


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


@pytest.fixture(params=["plain", "turbo"])
def model(request, monkeypatch):
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    modeling_flash_attention_utils.lazy_import_flash_attention("flash_attention_3")
    return random_model(request.param)


def logits(model, implementation: str, **inputs) -> torch.Tensor:
    model.config._attn_implementation = implementation
    with torch.no_grad():
        return model(IDS, use_cache=False, **inputs).logits


@pytest.mark.parametrize("positions", [None, *PACKED])
def test_windows_and_packed_documents_are_those_of_sdpa(model, positions):
    found, expected = (logits(model, name, position_ids=positions) for name in ("flash_attention_3", "sdpa"))
    assert (found - expected).abs().max() < 1e-4


def test_bounds_that_a_collator_brings_are_taken(model):
    bounds = torch.tensor([0, 20, 32, 64], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 32, "max_length_k": 32}
    found = logits(model, "flash_attention_3", position_ids=PACKED[0], **given)
    assert torch.equal(found, logits(model, "flash_attention_3", position_ids=PACKED[0]))


@pytest.mark.slow
def test_other_numbers_of_documents_compile_nothing_anew(model):
    torch.compiler.reset()
    model.config._attn_implementation = "flash_attention_3"
    compiled = torch.compile(model, backend="eager", dynamic=False)
    graphs = []
    for positions in PACKED:
        found = compiled(IDS, position_ids=positions, use_cache=False).logits
        assert (found - logits(model, "flash_attention_3", position_ids=positions)).abs().max() < 1e-4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
