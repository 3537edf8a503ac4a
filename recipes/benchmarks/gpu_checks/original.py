"""Compares training speed with the original nanochat's model and optimizer, alternating, at the same sizes.

Its code is imported from `--original`: a checkout, or a folder with checkouts named `classic` (the launch version,
compared with plain) and `current` (compared with turbo). Flash Attention 3 comes from the Hub; offline, the original
falls back to torch's attention. Both sides use full attention in all layers.
"""

import dataclasses
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evals.speed.timing import take_turns
from modeling_nanochat import NanoChatConfig

from . import Report, Setting, Skipped, free
from .runs import TrainingRun, make_batch, make_config, make_run
from .train import DEPTHS, layer_counts, prepare, rows_and_length

LEAST_RATIO = 1.0  # our tokens/s relative to the original's
TURNS = 2


class OriginalRun:
    """The original's model in training, set up as in its training script."""

    def __init__(self, setting: Setting, config: NanoChatConfig, batch: dict[str, torch.Tensor]):
        self.model = original_model(config, setting.device)
        classic = hasattr(self.model, "setup_optimizers")
        self.optimizers = self.model.setup_optimizers() if classic else [self.model.setup_optimizer()]
        self.autocast = classic and setting.on_gpu  # the current version casts its weights itself
        self.module = torch.compile(self.model, dynamic=False) if setting.on_gpu else self.model
        self.setting, self.batch = setting, batch

    def backward(self) -> float:
        ids = self.batch["input_ids"].to(self.setting.device, non_blocking=True)
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.autocast):
            loss = self.module(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        return loss.item()

    def pass_alone(self) -> float:
        loss = self.backward()
        self.model.zero_grad(set_to_none=True)
        return loss

    def step(self) -> float:
        loss = self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss


def original_model(config: NanoChatConfig, device: str) -> Any:
    """The imported version's model of these sizes with full attention and random weights; in float32 on a CPU."""
    gpt = importlib.import_module("nanochat.gpt")
    heads = {"n_head": config.num_attention_heads, "n_kv_head": config.num_key_value_heads}
    sizes = {"sequence_len": config.max_position_embeddings, "vocab_size": config.vocab_size, **heads}
    sizes |= {"n_layer": config.num_hidden_layers, "n_embd": config.hidden_size}
    if "window_pattern" in {field.name for field in dataclasses.fields(gpt.GPTConfig)}:
        sizes["window_pattern"] = "L"
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**sizes))
    model.to_empty(device=device)
    model.init_weights()
    if device == "cpu":  # the launch version's bfloat16 embeddings would need autocast
        for weight in model.parameters():
            weight.data = weight.data.float()
    with torch.no_grad():  # as in our run: zeros multiply faster
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


def check_original(setting: Setting, report: Report) -> None:
    compare(setting, report, "classic", "plain")


def check_current(setting: Setting, report: Report) -> None:
    compare(setting, report, "current", "turbo")


def prepare_original(setting: Setting) -> None:
    prepare_theirs(setting, "classic", "plain")


def prepare_current(setting: Setting) -> None:
    prepare_theirs(setting, "current", "turbo")


def prepare_plain(setting: Setting) -> None:
    prepare(dataclasses.replace(setting, window_pattern="L"), "plain")


def prepare_turbo(setting: Setting) -> None:
    prepare(dataclasses.replace(setting, window_pattern="L"), "turbo")


def prepare_theirs(setting: Setting, version: str, architecture: str) -> None:
    """Compile what [`compare`] will run of the original."""
    sys.path.insert(0, str(find_checkout(setting, version)))
    for layers in layer_counts(setting):
        config = make_config(setting, architecture, DEPTHS[architecture], layers)
        OriginalRun(setting, config, make_batch(setting, config, *rows_and_length(setting, architecture))).step()
        free()


def compare(setting: Setting, report: Report, version: str, architecture: str) -> None:
    sys.path.insert(0, str(find_checkout(setting, version)))
    setting = dataclasses.replace(setting, window_pattern="L")
    few, more = layer_counts(setting)
    rows, length = rows_and_length(setting, architecture)
    found = {}
    for layers in (few, more):
        config = make_config(setting, architecture, DEPTHS[architecture], layers)
        run = make_run(setting, config, rows, length)
        found[layers] = time_alternating(setting, {"ours": run, "original": OriginalRun(setting, config, run.batch)})
        report.figure(f"{layers} layers, ms", found[layers])
        del run
        free()
    depth = DEPTHS[architecture]
    full = {
        key: milliseconds + (found[more][key] - milliseconds) * (depth - few) / (more - few)
        for key, milliseconds in found[few].items()
    }
    report.figure(f"extrapolated to {depth} layers, ms", full)
    for what in ("pass", "step"):
        ratio = full[f"original {what}"] / full[f"ours {what}"]
        report.figure(f"{what}: our speed / the original's", ratio)
        if what == "pass" and setting.on_gpu:
            report.at_least("speed of a pass / the original's", ratio, LEAST_RATIO)


def find_checkout(setting: Setting, version: str) -> Path:
    """The folder that contains the package `nanochat` of this version of the original."""
    if setting.original is None:
        raise Skipped("give --original, a checkout of the original nanochat")
    root = Path(setting.original)
    for folder in (root / version, root):
        gpt = folder / "nanochat" / "gpt.py"
        if gpt.is_file() and ("def setup_optimizers" in gpt.read_text()) == (version == "classic"):
            return folder
    raise Skipped(f"no {version} version of the original in {root}")


def time_alternating(setting: Setting, runs: dict[str, TrainingRun | OriginalRun]) -> dict[str, float]:
    """Median milliseconds of a pass and of a step of each run, in alternating turns."""
    times: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for name, run in runs.items():
            # Warm up each time: memory that the other run has displaced.
            for what, seconds in take_turns(parts(run), setting.device, 2)[1].items():
                times.setdefault(f"{name} {what}", []).extend(seconds)
            free()
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def parts(run: TrainingRun | OriginalRun) -> dict[str, Callable[[], float]]:
    return {"pass": run.pass_alone, "step": run.step}
