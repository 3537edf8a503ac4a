"""Flash attention through transformers, with a stand-in for its package."""

import pytest
import torch
from conftest import shallow_model
from flash import install_flash_attention

IDS = torch.arange(64).reshape(2, 32)
# Two rows of packed documents, of which a row of 32 holds one to four.
PACKED = [
    torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    for rows in ([[20, 12], [32]], [[5, 9, 18], [1, 31]], [[16, 16], [30, 2]], [[3, 3, 3, 23], [8, 8, 8, 8]])
]


@pytest.fixture(params=["plain", "turbo"])
def model(request, monkeypatch):
    install_flash_attention(monkeypatch)
    return shallow_model(request.param)


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
