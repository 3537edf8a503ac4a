"""Training speed of the original nanochat's own model and optimizer beside ours, in turns, at the same sizes.

Its code is read from `--original`: a checkout, or a folder with checkouts called `classic` (the launch version, compared
with plain) and `current` (compared with turbo). Flash Attention 3 comes from the Hub, so where it cannot be fetched the
original falls back to torch's attention; both sides then have full attention in all layers.
"""

import dataclasses
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_nanochat import NanoChatConfig

from . import Report, Setting, Skipped
from .measuring import seconds_of
from .runs import TrainingRun, free, make_config, make_run
from .train import DEPTHS, layer_counts, rows_and_length

LEAST_RATIO = 1.0  # of our tokens/s to the original's
TURNS = 3


class OriginalRun:
    """The original's model in training, as its training script does it."""

    def __init__(self, setting: Setting, config: NanoChatConfig, batch: dict[str, torch.Tensor]):
        gpt = importlib.import_module("nanochat.gpt")
        heads = {"n_head": config.num_attention_heads, "n_kv_head": config.num_key_value_heads}
        sizes = {"sequence_len": config.max_position_embeddings, "vocab_size": config.vocab_size, **heads}
        sizes |= {"n_layer": config.num_hidden_layers, "n_embd": config.hidden_size}
        if "window_pattern" in {field.name for field in dataclasses.fields(gpt.GPTConfig)}:
            sizes["window_pattern"] = "L"
        with torch.device("meta"):
            self.model = gpt.GPT(gpt.GPTConfig(**sizes))
        self.model.to_empty(device=setting.device)
        self.model.init_weights()
        if not setting.on_gpu:  # the launch version has bfloat16 embeddings, which only autocast brings together with the rest
            for weight in self.model.parameters():
                weight.data = weight.data.float()
        with torch.no_grad():  # as ours are: zeros are multiplied faster
            for weight in self.model.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=weight.shape[1] ** -0.5)
        classic = hasattr(self.model, "setup_optimizers")
        self.optimizers = self.model.setup_optimizers() if classic else [self.model.setup_optimizer()]
        self.lowered = classic and setting.on_gpu  # today's casts by itself
        self.module = torch.compile(self.model, dynamic=False) if setting.on_gpu else self.model
        self.setting, self.batch = setting, batch

    def backward(self) -> float:
        ids = self.batch["input_ids"].to(self.setting.device, non_blocking=True)
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.lowered):
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


def check_original(setting: Setting, report: Report) -> None:
    compare(setting, report, "classic", "plain")


def check_current(setting: Setting, report: Report) -> None:
    compare(setting, report, "current", "turbo")


def compare(setting: Setting, report: Report, version: str, architecture: str) -> None:
    sys.path.insert(0, str(find_checkout(setting, version)))
    setting = dataclasses.replace(setting, window_pattern="L")
    few, more = layer_counts(setting)
    rows, length = rows_and_length(setting, architecture)
    found = {}
    for layers in (few, more):
        config = make_config(setting, architecture, DEPTHS[architecture], layers)
        run = make_run(setting, config, rows, length)
        found[layers] = in_turns(setting, {"ours": run, "original": OriginalRun(setting, config, run.batch)})
        report.figure(f"{layers} layers, ms", found[layers])
        del run
        free()
    depth = DEPTHS[architecture]
    whole = {
        key: found[few][key] + (found[more][key] - found[few][key]) * (depth - few) / (more - few) for key in found[few]
    }
    report.figure(f"extrapolated to {depth} layers, ms", whole)
    for what in ("pass", "step"):
        ratio = whole[f"original {what}"] / whole[f"ours {what}"]
        report.figure(f"{what}: our speed / the original's", ratio)
        if what == "pass" and setting.on_gpu:
            report.at_least("speed of a pass / the original's", ratio, LEAST_RATIO)


def find_checkout(setting: Setting, version: str) -> Path:
    """The folder that holds the package `nanochat` of the original's `version`."""
    if setting.original is None:
        raise Skipped("give --original, a checkout of the original nanochat")
    root = Path(setting.original)
    for folder in (root / version, root):
        gpt = folder / "nanochat" / "gpt.py"
        if gpt.is_file() and ("def setup_optimizers" in gpt.read_text()) == (version == "classic"):
            return folder
    raise Skipped(f"no {version} version of the original in {root}")


def in_turns(setting: Setting, runs: dict[str, TrainingRun | OriginalRun]) -> dict[str, float]:
    """Median milliseconds of a pass and of a step of each."""
    times: dict[str, list[float]] = {f"{name} {what}": [] for name in runs for what in ("pass", "step")}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            calls: dict[str, Callable] = {"pass": run.pass_alone, "step": run.step}
            for what, call in calls.items():
                call()  # what the other side has displaced from memory comes back
                times[f"{name} {what}"] += [seconds_of(call, setting.device) for _ in range(2 if turn else 0)]
            free()
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}
