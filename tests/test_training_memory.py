"""The formulas of training's memory against torch's own count on CUDA tensors without data, and against an H100's."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.sizes import training_bytes
from recipes.benchmarks.memory_table import SIZES, VOCABULARIES, document, read_speeds

RESULTS = Path(__file__).parents[1] / "recipes" / "benchmarks" / "results" / "h100-2026-11-26.jsonl"
LENGTH = 2048


def make_config(architecture: str, depth: int, **more):
    sizes = {"vocab_size": VOCABULARIES[architecture], "max_position_embeddings": LENGTH} | more
    return ARCHITECTURES[architecture][0].from_depth(depth, **sizes)


def tracked(config, rows: int, accumulates: bool) -> int:
    """Bytes at the peak of forward and backward pass by torch's tracker, on a device that need not be there."""
    model_class = next(model for kind, model in ARCHITECTURES.values() if kind is type(config))
    with FakeTensorMode():
        with torch.device("cuda"):
            model = model_class(config).train()
            ids = torch.zeros(rows, LENGTH, dtype=torch.long)
        if accumulates:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        tracker = MemTracker()
        tracker.track_external(model, ids)
        with tracker, torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, shift_labels=ids, use_cache=False).loss
            loss.backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]["Total"]
