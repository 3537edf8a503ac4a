"""A launch file that asks for more than the machine has is refused before anything runs."""

import pytest
import torch

from modeling_nanochat.errors import UserError
from recipes.ladder.launch import check_processes


def check(monkeypatch, devices, config):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    check_processes(str(config))


@pytest.mark.parametrize(
    ("devices", "config", "complaint"),
    [
        (0, "ddp_8gpu", r"asks for 8 GPUs and this machine has none; give .* accelerate_configs/cpu.yaml$"),
        (0, "single_gpu", r"asks for 1 GPUs and this machine has none"),
        (4, "ddp_8gpu", r"asks for 8 GPUs and this machine has 4; copy it with num_processes: 4"),
        (7, "multi_node", r"asks for 8 GPUs and this machine has 7"),
    ],
)
def test_fewer_gpus_than_a_launch_file_asks_for_are_refused(monkeypatch, devices, config, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        check(monkeypatch, devices, f"accelerate_configs/{config}.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("devices", "config"), [(0, "cpu"), (8, "ddp_8gpu"), (8, "multi_node"), (1, "single_gpu")])
def test_as_many_as_it_asks_for_pass(monkeypatch, devices, config):
    check(monkeypatch, devices, f"accelerate_configs/{config}.yaml")


def test_a_launch_file_that_names_no_gpus_takes_what_is_there(monkeypatch, tmp_path):
    (tmp_path / "any.yaml").write_text("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: false\n")
    check(monkeypatch, 0, tmp_path / "any.yaml")


def test_several_processes_on_a_cpu_that_accelerate_would_start_only_one_of_are_refused(monkeypatch, tmp_path):
    (tmp_path / "two.yaml").write_text("use_cpu: true\nnum_processes: 2\nmixed_precision: bf16\n")
    with pytest.raises(UserError, match="starts only one process on a CPU; set num_processes: 1"):
        check(monkeypatch, 0, tmp_path / "two.yaml")
    (tmp_path / "two.yaml").write_text("use_cpu: true\nnum_processes: 2\n")
    check(monkeypatch, 0, tmp_path / "two.yaml")
