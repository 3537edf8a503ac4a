"""Memory and seconds of passes, updates and decoding on given hardware: for `run.py --dry_run` and the memory table.

On H100s and H200s by what `gpu_check` measured on one H100; on other GPUs with an assumed utilization.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.errors import UserError
from modeling_nanochat.sizes import (
    decode_bytes_per_step,
    decode_flops_per_token,
    parameter_counts,
    training_bytes,
    training_flops_per_token,
)
from recipes.training.batch_size import (
    ACCELERATOR_TOKENS,
    CPU_TOKENS,
    SHARE_OF_MEMORY,
    activation_bytes,
    divisors,
)

from .hardware import CARDS, GIB, Hardware, cards

LENGTH = 2048  # tokens per row of the measurements
VOCABULARIES = {"plain": 65536, "turbo": 32768}  # of the measurements
MEASURED = {"plain": ("g3", 20), "turbo": ("g3_turbo", 24)}  # check of gpu_check and the depth it extrapolates to
RESULTS = [Path(__file__).parents[2] / "benchmarks" / "results" / f"h100-2026-11-{day}.jsonl" for day in (26, 27)]
LIKE_MEASURED = (CARDS["h100"].device, CARDS["h200"].device)
PEAK = cards("h100", 1).flops
ASSUMED_MFU = 0.4  # of a pass on a card that was not measured
FLOAT8_GAIN = 1.10  # measured: six layers of d24 turbo, whole step
CONTEXT = 0.6  # GiB used by the CUDA context
SPARE = 1.04  # reserved / allocated memory; at most 1.033 was measured on the H100
# Without compilation: 94 ms for a pass of d12 with its update, however small; and the speed of large ones.
EAGER_SECONDS_PER_LAYER, EAGER_SHARE = 0.094 / 12, 0.6
DECODE_SECONDS_PER_LAYER = 0.0155 / 20  # the chat engine at d20, uncompiled: 49 to 81 steps/s from 1 to 128 rows
DECODE_SHARE = 0.35  # of the peak bandwidth
RENDERING = 115e3  # tokens/s of a core that renders conversations, as measured on identity data


@dataclass(frozen=True)
class Measured:
    """What one H100 reached with an architecture: FLOP/s of passes, and seconds of the update of `config`."""

    config: NanoChatConfig
    flops: float
    update_seconds: float


@dataclass(frozen=True)
class Machine:
    """Hardware with the measured speeds, by architecture.

    Attributes:
        float8: Whether our own loop trains large layers in that; TRL's trainers and evaluations compute in bfloat16.
    """

    hardware: Hardware
    speeds: Mapping[str, Measured]
    float8: bool = False

    @property
    def is_measured(self) -> bool:
        return self.hardware.device.startswith(LIKE_MEASURED)

    def utilization(self, config: NanoChatConfig) -> float:
        """The share of the bfloat16 peak that a pass reaches; 1 where `Hardware.flops` is what training reaches."""
        if self.hardware.kind != "cuda":
            return 1.0
        return self.speeds[architecture(config)].flops / PEAK if self.is_measured else ASSUMED_MFU

    def flops(self, config: NanoChatConfig) -> float:
        """FLOP/s that one device reaches in compiled passes, without float8."""
        return self.utilization(config) * self.hardware.flops

    def step_seconds(self, config: NanoChatConfig, tokens: int, length: int) -> float:
        """Seconds of a step of `tokens` in rows of `length`: passes, exchange of gradients and weights, update."""
        devices, gain = self.hardware.count, FLOAT8_GAIN if self.float8 else 1
        passes = tokens * training_flops_per_token(config, length) / (gain * self.flops(config) * devices)
        exchanged = 2 * 4 * parameter_counts(config)["total"] * (devices - 1) / devices
        return passes + exchanged / self.hardware.link + self.update_seconds(config) / devices

    def update_seconds(self, config: NanoChatConfig) -> float:
        """Seconds of one device for the whole optimizer step, which devices share."""
        if self.hardware.kind != "cuda":
            return 30 * update_work(config) / self.hardware.flops  # five iterations of three products
        measured = self.speeds[architecture(config)]
        work = update_work(config) / update_work(measured.config)
        return measured.update_seconds * work * PEAK / self.hardware.flops

    def eager_seconds(self, config: NanoChatConfig, tokens: float, length: int) -> float:
        """Seconds of a pass of `tokens` on each device with its update, not compiled."""
        work = tokens * training_flops_per_token(config, length) / (EAGER_SHARE * self.flops(config))
        return max(config.num_hidden_layers * EAGER_SECONDS_PER_LAYER * (self.hardware.kind == "cuda"), work)

    def forward_seconds(self, config: NanoChatConfig, tokens: float, length: int, devices: int = 1) -> float:
        """Seconds of uncompiled forward passes over `tokens`, which `devices` share."""
        work = tokens * training_flops_per_token(config, length) / 3
        return work / (EAGER_SHARE * self.flops(config) * devices)

    def rendering_seconds(self, tokens: float) -> float:
        """Seconds in which each process renders all conversations, on its share of the cores."""
        return tokens / (RENDERING * self.hardware.cores)

    def decode_seconds(self, config: NanoChatConfig, replies: float, rows: int, longest: int) -> float:
        """Seconds of one device for `replies` of up to `longest` tokens, `rows` at a time; the next take free rows.

        The mean reply is assumed to have half as many.
        """
        steps = longest / 2 * (1 + max(1.0, replies / rows))
        return steps * self.decode_step_seconds(config, min(rows, max(1, round(replies))), longest)

    def decode_step_seconds(self, config: NanoChatConfig, rows: int, context: int) -> float:
        least = config.num_hidden_layers * DECODE_SECONDS_PER_LAYER
        work = rows * decode_flops_per_token(config, context) / self.hardware.flops
        read = decode_bytes_per_step(config, context, rows, 4) / (DECODE_SHARE * self.hardware.bandwidth)
        return max(least, work, read)


def architecture(config: NanoChatConfig) -> str:
    return next(name for name, (kind, _) in ARCHITECTURES.items() if type(config) is kind)


def update_work(config: NanoChatConfig) -> int:
    """Relative cost of Muon's matrix products, which grows as parameters times width."""
    return parameter_counts(config)["transformer_matrices"] * config.hidden_size


def rows_that_fit(
    config: NanoChatConfig, tokens: int, hardware: Hardware, length: int = LENGTH, most_rows: int | None = None
) -> int:
    """The most rows of `length` that divide a device's share of a step of `tokens` and fit; 0 if none do."""
    limit = CPU_TOKENS if hardware.kind == "cpu" else ACCELERATOR_TOKENS
    limit = min(max(1, limit // length), most_rows or limit)
    sizes = [rows for rows in divisors(tokens // length // hardware.count) if rows <= limit]
    return next((rows for rows in sizes if step_bytes(config, tokens, rows, hardware, length) <= usable(hardware)), 0)


def usable(hardware: Hardware) -> float:
    """Bytes of a device that a step may take."""
    if hardware.kind == "cuda":
        return (hardware.gib - CONTEXT) / SPARE * GIB
    return SHARE_OF_MEMORY * hardware.gib * GIB


def step_bytes(config: NanoChatConfig, tokens: int, rows: int, hardware: Hardware, length: int = LENGTH) -> int:
    """Peak bytes of a device in a step of `tokens` with passes of `rows`."""
    several, memory = rows * length * hardware.count < tokens, int(hardware.gib * GIB)
    shape = {"processes": hardware.count, "accumulates": several, "memory": memory}
    if hardware.kind == "cuda":
        return training_bytes(config, rows, length, **shape)["total"]
    parts = training_bytes(config, rows, length, number_bytes=4, compiled=False, **shape)
    held = sum(parts[kind] for kind in ("weights", "optimizer", "gradients"))
    return held + activation_bytes(config, length, rows, torch.device(hardware.kind))


def read_speeds(*paths: Path) -> dict[str, Measured]:
    """Speeds that `gpu_check` extrapolated to full depth, by architecture; of several files, the last counts.

    Raises:
        UserError: A file cannot be read, or they lack an architecture.
    """
    figures: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"speeds {path}: cannot be read ({error}); give the output of gpu_check.py") from error
        figures |= {result["check"]: result["figures"] for result in results}
    speeds = {}
    for name, (check, depth) in MEASURED.items():
        wanted = f"extrapolated to {depth} layers"
        if wanted not in figures.get(check, {}):
            raise UserError(f"speeds {paths[-1]}: {check} has no {wanted!r}; run gpu_check.py --only {check}")
        found, config = figures[check][wanted], full_size(name, depth)
        flops = found["pass_tokens_per_second"] * training_flops_per_token(config, LENGTH)
        speeds[name] = Measured(config, flops, (found["step_ms"] - found["pass_ms"]) / 1e3)
    return speeds


def full_size(architecture: str, depth: int) -> NanoChatConfig:
    """The configuration of a depth with the vocabulary and row length of the measurements."""
    sizes = {"vocab_size": VOCABULARIES[architecture], "max_position_embeddings": LENGTH}
    return ARCHITECTURES[architecture][0].from_depth(depth, **sizes)
