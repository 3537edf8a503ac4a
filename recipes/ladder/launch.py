"""How the training processes start: the command of a launch file, and whether this machine has what it asks for."""

import os
import sys
from pathlib import Path

import psutil

from modeling_nanochat.errors import UserError

from .step import read_yaml

ROOT = Path(__file__).resolve().parents[2]
# The settings of `accelerate_configs/cpu.yaml` beside the number of processes; none of them needs a launcher.
ONLY_CPU = {
    "compute_environment": "LOCAL_MACHINE",
    "num_machines": 1,
    "machine_rank": 0,
    "mixed_precision": "no",
    "use_cpu": True,
}


def launcher(config: str | None) -> list[str]:
    """The launcher's command, with this Python, and nothing else without a file; shipped ones are found from anywhere.

    For one CPU process `accelerate launch` only sets variables, after two seconds of imports; `env` replaces it there.
    It never starts more than one on a CPU; torchrun does.
    """
    if config is None:
        return [sys.executable]
    found, settings = launch_file(config)
    threads, processes = threads_on_cpu(settings), process_count(settings)
    if needs_no_launcher(settings):
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        variables = ["ACCELERATE_USE_CPU=true", *(f"OMP_NUM_THREADS={count}" for count in threads)]
        return ["env", *variables, sys.executable, *(several if processes > 1 else [])]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command += ["--config_file", os.path.relpath(found)]
    return command + [word for count in threads for word in ("--num_cpu_threads_per_process", str(count))]


def launch_file(config: str) -> tuple[Path, dict]:
    """The path and the settings of a launch file, which may be named relative to the repository."""
    found = next((path for path in (Path(config), ROOT / config) if path.is_file()), None)
    if found is None:
        raise UserError(f"accelerate_config {config}: no such file; accelerate_configs/ holds the shipped ones")
    return found, read_yaml(found)


def process_count(settings: dict) -> int:
    return settings.get("num_processes") or 1


def needs_no_launcher(settings: dict) -> bool:
    """Whether a launch file asks for processes on the CPU and for nothing else."""
    others = {key: value for key, value in settings.items() if key not in ("num_processes", "distributed_type")}
    return bool(settings.get("use_cpu")) and others.items() <= ONLY_CPU.items()


def threads_on_cpu(settings: dict) -> list[int]:
    """`[threads per process]` on a CPU, the default of `accelerate launch`, which warns if it is unset; else `[]`."""
    if not settings.get("use_cpu") or "OMP_NUM_THREADS" in os.environ:
        return []
    return [max(1, (psutil.cpu_count(logical=False) or 1) // process_count(settings))]


def check_processes(config: str | None) -> None:
    """Raise [`UserError`] if a launch file asks for more processes than would start on this machine."""
    import torch

    if config is None:
        return
    _, settings = launch_file(config)
    where, wanted = f"accelerate_config {config}", process_count(settings) // (settings.get("num_machines") or 1)
    if settings.get("use_cpu"):
        if wanted > 1 and not needs_no_launcher(settings):
            raise UserError(
                f"{where}: `accelerate launch` starts only one process on a CPU; set num_processes: 1, or keep to the "
                "keys of accelerate_configs/cpu.yaml"
            )
        return
    asks_for_gpus = "gpu_ids" in settings or settings.get("distributed_type", "NO") != "NO"
    if asks_for_gpus and (found := torch.accelerator.device_count()) < wanted:
        has, instead = "none", "give --accelerate_config accelerate_configs/cpu.yaml"
        if found:
            has, instead = str(found), f"copy it with num_processes: {found}, and give the copy by --accelerate_config"
        raise UserError(f"{where}: asks for {wanted} GPUs and this machine has {has}; {instead}")
