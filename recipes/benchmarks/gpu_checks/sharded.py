"""Compares FSDP2 on one process with training without it: losses, dtypes, chunked loss, memory."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from recipes.training.loop import model_inputs

from . import ROOT, Report, Setting
from .runs import TrainingRun, bare_accelerator, make_config, make_run
from .stages import launch

DEPTH = 12  # determines the width; fewer layers are used
STEPS = 3
MOST_MEMORY = 1.05  # relative; one process saves nothing by sharding and gathers one layer at a time
LOSS_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative, after the steps
WAYS = {"alone": "single_gpu.yaml", "fsdp2": "fsdp2.yaml"}
MEASURE = """
import sys
from recipes.benchmarks.gpu_checks.sharded import measure
measure(*sys.argv[1:])
"""


def check_fsdp2(setting: Setting, report: Report) -> None:
    found = {way: launch_measure(setting, way) for way in WAYS}
    for way, figures in found.items():
        report.figure(way, figures)
    sharded, alone = found["fsdp2"], found["alone"]
    report.holds("the weights are sharded", sharded["sharded"] and not alone["sharded"])
    report.holds("loss in float32", sharded["dtype of the loss"] == "torch.float32")
    report.holds("gradients in float32", sharded["dtypes of gradients"] == ["torch.float32"])
    report.holds("the loss is made in chunks", not sharded["whole logits"])
    difference = abs(sharded["losses"][-1] / alone["losses"][-1] - 1)
    report.at_most(f"loss after {STEPS} steps, relative difference", difference, LOSS_DIFFERENCE[setting.dtype])
    if setting.on_gpu:
        report.at_most("peak memory / without FSDP2", sharded["peak_gib"] / alone["peak_gib"], MOST_MEMORY)


def launch_measure(setting: Setting, way: str) -> dict[str, object]:
    """The output of [`measure`] in a process launched by Accelerate with the way's config.

    Raises:
        RuntimeError: The process failed; the message has its last line.
    """
    script = Path(setting.work_dir, "measure_sharded.py")
    script.write_text(MEASURE, encoding="utf-8")
    config = ROOT / "accelerate_configs" / (WAYS[way] if setting.on_gpu else "cpu.yaml")
    arguments = [json.dumps(asdict(setting)), way]
    code, output = launch(setting, str(script), arguments, config, options=["--num_processes", "1"])
    last = (output.splitlines() or [""])[-1]
    if code:
        raise RuntimeError(f"{way} ended with code {code}: {last}")
    return json.loads(last)


def measure(setting: str, way: str) -> None:
    """Run a few training steps and print their results as one line of JSON."""
    setting = Setting(**json.loads(setting))
    if way == "fsdp2" and not setting.on_gpu:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    accelerator = bare_accelerator(setting, 1, 1)
    if way == "fsdp2" and not setting.on_gpu:
        force_sharding()
    rows, length = (16, 2048) if setting.on_gpu else (2, 32)
    config = make_config(setting, "plain", DEPTH, layers=4 if setting.on_gpu else 2)
    run = make_run(setting, config, rows, length, accelerator=accelerator)
    found = inspect_pass(run)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found["losses"] = [run.step() for _ in range(STEPS)]
    if setting.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    accelerator.end_training()
    print(json.dumps(found), flush=True)


def force_sharding() -> None:
    """Enable FSDP2 on a CPU, which torch supports but Accelerate does not."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def inspect_pass(run: TrainingRun) -> dict[str, object]:
    """Dtypes of loss and gradients, whether weights are sharded, and whether full logits were computed."""
    accelerator = run.accelerator
    inputs, tokens = model_inputs(run.batch, accelerator.device), torch.tensor(run.tokens, device=accelerator.device)
    with accelerator.autocast():
        outputs = run.module(**inputs, use_cache=False, num_items_in_batch=tokens)
    accelerator.backward(outputs.loss)
    gradients = {str(p.grad.dtype) for p in run.model.parameters() if p.grad is not None}
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "sharded": all(type(p).__name__ == "DTensor" for p in run.model.parameters()),
        "dtype of the loss": str(outputs.loss.dtype),
        "dtypes of gradients": sorted(gradients),
        "whole logits": outputs.logits is not None,
    }
