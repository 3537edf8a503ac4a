"""Launch files: through Accelerate's loader, through its launcher's arguments, and run where a CPU suffices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import accelerate.utils.launch
import pytest
import torch.distributed.run
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import random_model
from torch.distributed.fsdp import StateDictType

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in (ROOT / "accelerate_configs").glob("*.yaml")}
SECTIONS = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}


@pytest.fixture(autouse=True)
def float8_installed(monkeypatch):
    """The launcher refuses float8 where torchao is missing."""
    monkeypatch.setattr(accelerate.utils.launch, "is_fp8_available", lambda: True)


def test_every_file_is_there_and_says_how_it_is_used():
    assert FILES.keys() == {"cpu", "single_gpu", "ddp_8gpu", "fsdp2", "multi_node", "fp8"}
    index = (ROOT / "accelerate_configs" / "README.md").read_text()
    for name, path in FILES.items():
        comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"accelerate launch --config_file accelerate_configs/{name}.yaml" in line for line in comments)
        assert f"`{name}.yaml`" in index


def arguments(name: str, *options: str):
    """The launcher's arguments, with the file's values filled in as it does."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(FILES[name]), *options, "script.py", "--depth", "4"])
    return _validate_launch_command(args)[0]


def environment(name: str, *options: str) -> dict[str, str]:
    """What the launched script finds in its environment."""
    args = arguments(name, *options)
    if args.multi_gpu or args.use_fsdp:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_one_that_the_launcher_reads(name):
    """Unknown keys of the sections are taken in silently."""
    known = {action.dest for action in launch_command_parser()._actions}
    for section, values in yaml.safe_load(FILES[name].read_text()).items():
        if isinstance(values, dict):
            keys = {key if key.startswith(SECTIONS[section]) else SECTIONS[section] + key for key in values}
            assert keys <= known, keys - known


@pytest.mark.parametrize(
    "name, processes, machines, precision, multi_gpu, fsdp",
    [
        ("cpu", 1, 1, "no", False, False),
        ("single_gpu", 1, 1, "bf16", False, False),
        ("ddp_8gpu", 8, 1, "bf16", True, False),
        ("fsdp2", 8, 1, "bf16", False, True),
        ("fp8", 8, 1, "fp8", True, False),
        ("multi_node", 16, 2, "bf16", True, False),
    ],
)
def test_the_launcher_understands_it(name, processes, machines, precision, multi_gpu, fsdp):
    config = load_config_from_file(str(FILES[name]))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    args = arguments(name)
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, precision)
    assert (args.multi_gpu, args.use_fsdp, args.use_cpu) == (multi_gpu, fsdp, name == "cpu")
    assert args.training_script_args == ["--depth", "4"]


def test_the_command_line_goes_before_the_file():
    args = arguments("ddp_8gpu", "--num_processes", "4", "--mixed_precision", "no")
    assert (args.num_processes, args.mixed_precision) == (4, "no")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_node_gets_its_rank_and_the_address_of_the_first(rank):
    port = str(free_port())
    node = ["--machine_rank", str(rank), "--main_process_ip", "10.0.0.1", "--main_process_port", port]
    args = arguments("multi_node", *node)
    prepare_multi_gpu_env(args)
    command = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    config = torch.distributed.run.config_from_args(
        _filter_args(args, torch.distributed.run.get_args_parser(), command)
    )[0]
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert config.rdzv_endpoint == f"10.0.0.1:{port}" and config.rdzv_configs["rank"] == rank


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_fsdp2_shards_by_decoder_layer(architecture):
    model = random_model(architecture)
    with patch_environment(**environment("fsdp2")):
        plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert not (plugin.cpu_ram_efficient_loading or plugin.activation_checkpointing)


@pytest.mark.parametrize("name, options", [("fp8", ()), ("fsdp2", ("--mixed_precision", "fp8"))])
def test_float8_is_torchaos_and_gathers_no_weights_in_it(name, options):
    found = environment(name, *options)
    assert found["ACCELERATE_MIXED_PRECISION"] == "fp8" and found["ACCELERATE_FP8_BACKEND"] == "AO"
    assert found["ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"] == "False"


# Runs. The script sums over all processes and says who was there.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from recipes.training.device import accelerator_options
accelerator = Accelerator(**accelerator_options())
rank = torch.tensor(accelerator.process_index + 1.0)
facts = {
    "sum": accelerator.reduce(rank, "sum").item(),
    "processes": accelerator.num_processes,
    "device": accelerator.device.type,
    "precision": accelerator.mixed_precision,
    "arguments": sys.argv[2:],
}
Path(sys.argv[1], str(accelerator.process_index)).write_text(json.dumps(facts))
accelerator.wait_for_everyone()
accelerator.end_training()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(commands: list[list[str]], timeout: float = 120) -> list[str]:
    """Run the commands at the same time, on CPUs; returns what each printed, after all of them have succeeded."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    changed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=os.environ | changed, **pipes) for command in commands]
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in results]


def run_on_nodes(script: Path, *script_arguments: str, nodes: int = 2, timeout: float = 120) -> list[str]:
    """Run a script on several nodes of one process each, all on this machine; returns what each node printed."""
    meeting = ["--nnodes", str(nodes), "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    meeting += ["--master_port", str(free_port())]
    script_command = [str(script), *script_arguments]
    commands = [[*TORCHRUN, *meeting, "--node_rank", str(rank), *script_command] for rank in range(nodes)]
    return run_together(commands, timeout)


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def facts_of(folder: Path, processes: int) -> list[dict]:
    facts = [json.loads((folder / str(rank)).read_text()) for rank in range(processes)]
    assert not (folder / str(processes)).exists()
    return facts


def test_cpu_runs(script, tmp_path):
    run_together([[*ACCELERATE, "--config_file", str(FILES["cpu"]), str(script), str(tmp_path), "--depth", "4"]])
    (facts,) = facts_of(tmp_path, 1)
    expected = {"sum": 1.0, "processes": 1, "device": "cpu", "precision": "no", "arguments": ["--depth", "4"]}
    assert facts == expected


@pytest.mark.slow
def test_two_processes_run_by_torchrun(script, tmp_path):
    run_together([[*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)]])
    for facts in facts_of(tmp_path, 2):
        assert (facts["sum"], facts["processes"], facts["precision"]) == (3.0, 2, "no")


@pytest.mark.slow
def test_two_nodes_run_by_torchrun(script, tmp_path):
    run_on_nodes(script, str(tmp_path))
    for facts in facts_of(tmp_path, 2):
        assert (facts["sum"], facts["processes"], facts["device"]) == (3.0, 2, "cpu")


@pytest.mark.slow
def test_two_nodes_run_by_their_launch_file(script, tmp_path):
    """The file is for GPUs; without one Accelerate takes the CPU."""
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    changed = ["--num_processes", "2", "--mixed_precision", "no", *meeting]
    command = [*ACCELERATE, "--config_file", str(FILES["multi_node"]), *changed]
    run_together([[*command, "--machine_rank", str(rank), str(script), str(tmp_path)] for rank in (0, 1)])
    for facts in facts_of(tmp_path, 2):
        assert (facts["sum"], facts["processes"], facts["device"]) == (3.0, 2, "cpu")
