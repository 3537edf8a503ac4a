"""The formulas of training's memory against torch's own count on tensors without data, and against an H100's."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import modeling_nanochat.modeling_nanochat
from modeling_nanochat import ARCHITECTURES, softcapped_loss
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import training_bytes
from recipes.benchmarks.memory_table import COLUMNS, SIZES, document
from recipes.ladder import estimate_speed
from recipes.ladder.estimate_speed import VOCABULARIES, read_speeds, rows_that_fit
from recipes.ladder.hardware import cards

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results" / "h100-2026-11-26.jsonl"
LENGTH = 2048


def make_config(architecture: str, depth: int, **more):
    sizes = {"vocab_size": VOCABULARIES[architecture], "max_position_embeddings": LENGTH} | more
    return ARCHITECTURES[architecture][0].from_depth(depth, **sizes)


def tracked(config, rows: int, accumulates: bool) -> int:
    """Bytes at the peak of forward and backward pass by torch's tracker, of tensors without data."""
    model_class = next(model for kind, model in ARCHITECTURES.values() if kind is type(config))
    with FakeTensorMode():
        model, ids = model_class(config).train(), torch.zeros(rows, LENGTH, dtype=torch.long)
        for p in model.parameters() if accumulates else ():
            p.grad = torch.zeros_like(p)
        tracker = MemTracker()
        tracker.track_external(model, ids)
        with tracker, torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """torch without CUDA cannot run autograd on CUDA's tensors, not even without data: the CPU's, in CUDA's chunks."""
    monkeypatch.setattr(softcapped_loss, "chunk_logits", lambda device: softcapped_loss.affordable_chunk(0))
    # of another class here
    monkeypatch.setattr(modeling_nanochat.modeling_nanochat, "is_only_a_weight", lambda layer: True)


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("architecture, depth, layers, rows", [("plain", 20, 3, 8), ("turbo", 24, 2, 4)])
def test_a_pass_takes_what_torchs_tracker_counts(as_on_an_accelerator, architecture, depth, layers, rows, accumulates):
    config = make_config(architecture, depth, num_hidden_layers=layers)
    predicted = training_bytes(config, rows, LENGTH, compiled=False, accumulates=accumulates, memory=0)
    expected = tracked(config, rows, accumulates) + predicted["optimizer"]
    assert predicted["total"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("architecture, check, rows", [("plain", "g3", 32), ("turbo", "g3_turbo", 16)])
def test_layers_take_what_an_h100_has_measured(architecture, check, rows):
    """Compiled; four layers more. That run's MLP stored its activation beside what this one keeps."""
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    figures = next(result["figures"] for result in results if result["check"] == check)
    measured = (figures["8 layers"]["peak_gib"] - figures["4 layers"]["peak_gib"]) * 2**30
    few, more = (
        make_config(architecture, {"plain": 20, "turbo": 24}[architecture], num_hidden_layers=n) for n in (4, 8)
    )
    predicted = [training_bytes(config, rows, LENGTH, accumulates=False)["total"] for config in (few, more)]
    stored = 4 * rows * LENGTH * 2 * few.intermediate_size
    assert predicted[1] - predicted[0] + stored == pytest.approx(measured, rel=0.1)


def test_more_processes_share_the_optimizers_state_alone():
    config = make_config("turbo", 24)
    one, eight = (training_bytes(config, 4, LENGTH, processes=count) for count in (1, 8))
    assert eight["optimizer"] == one["optimizer"] // 8
    assert eight["weights"] == one["weights"] and eight["activations"] == one["activations"]
    assert sum(eight.values()) == 2 * eight["total"]


def test_the_update_decides_where_the_pass_is_small():
    config = make_config("plain", 20)
    small = training_bytes(config, 1, 64, accumulates=False)
    assert "update" in small and small["gradients"] == small["weights"]
    assert "activations" in training_bytes(config, 16, LENGTH, accumulates=False)


def test_the_table_in_the_repository_is_the_one_that_the_script_writes():
    assert (RESULTS.parents[1] / "memory.md").read_text(encoding="utf-8") == document(
        read_speeds(*estimate_speed.RESULTS)
    )


def test_a_card_with_more_memory_holds_more_rows():
    for size in SIZES:
        for processes in (1, 8):
            tokens, hardware = size.plan.total_batch_size, [cards(card, processes) for card in COLUMNS.values()]
            rows = [rows_that_fit(size.config, tokens, each) for each in hardware]
            assert rows == sorted(rows) and rows[-1] > 0


def test_speeds_that_are_missing_are_named(tmp_path):
    (tmp_path / "speeds.jsonl").write_text(RESULTS.read_text().splitlines()[0])
    with pytest.raises(UserError, match="g3 has no 'extrapolated to 20 layers'"):
        read_speeds(tmp_path / "speeds.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_speeds(tmp_path / "nothing.jsonl")
