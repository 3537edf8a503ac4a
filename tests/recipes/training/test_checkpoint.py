"""Checkpoints: whole or absent, verified before use, and good for any number of processes."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Adafactor

from modeling_nanochat.errors import UserError
from recipes.training.arguments import LoopArguments
from recipes.training.checkpoint import checkpoints as module
from recipes.training.checkpoint.checkpoints import (
    FORMAT,
    Checkpoint,
    Checkpoints,
    RunState,
    interrupted_run,
    random_state,
    restore_random_state,
    set_random_state,
)
from recipes.training.checkpoint.files import Damaged, sha256, verify
from recipes.training.checkpoint.optimizer_state import load_optimizer_state, optimizer_state
from recipes.training.optim.optimizer import MuonAdamW
from recipes.training.setup import find_checkpoint


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", Accelerator(cpu=True))


def state_of(step):
    return RunState(train_state={"steps": step}, run_config={"depth": 2}, seconds=1.5)


def save(checkpoints, step):
    shards = {"optimizer": {"a": torch.full((3,), float(step))}, "data": {"b": torch.arange(5)}}
    checkpoints.save(step, state_of(step), shards, lambda: {"w": torch.full((2, 2), float(step))})
    checkpoints.complete()


def test_what_was_saved_is_found_again_and_old_ones_go(checkpoints):
    for step in (10, 20, 30):
        save(checkpoints, step)
    assert [checkpoint.step for checkpoint in checkpoints.present()] == [20, 30]
    found = checkpoints.find("auto")
    assert found.step == 30 and found.state == state_of(30)
    assert torch.equal(found.weights()["w"], torch.full((2, 2), 30.0))
    (optimizer,) = found.shards("optimizer")
    assert list(optimizer.keys()) == ["a"] and torch.equal(optimizer.get_tensor("a"), torch.full((3,), 30.0))
    assert (found.folder / "optimizer-00000-of-00001.safetensors").is_file()
    assert not list(checkpoints.folder.glob(".*"))


def test_a_folder_can_be_named(checkpoints, tmp_path):
    for step in (10, 20):
        save(checkpoints, step)
    assert checkpoints.find(str(checkpoints.folder / "step-00000010")).step == 10
    with pytest.raises(UserError, match="not a checkpoint; give auto"):
        checkpoints.find(str(tmp_path))


def test_the_newest_can_be_kept(checkpoints):
    for step in (10, 20):
        save(checkpoints, step)
    checkpoints.delete(keep_newest=True)
    assert [checkpoint.step for checkpoint in checkpoints.present()] == [20] and checkpoints.find("auto").step == 20
    checkpoints.delete()
    assert not checkpoints.present()


def test_an_interrupted_runs_settings_come_from_the_newest_state_that_is_whole(checkpoints):
    assert interrupted_run(checkpoints.folder, "auto") is None
    for step in (10, 20):
        save(checkpoints, step)
    older, newer = (checkpoint.folder for checkpoint in checkpoints.present())
    os.truncate(newer / "model.safetensors", 3)  # not read
    for resume in ("auto", str(older), str(newer)):
        assert interrupted_run(checkpoints.folder, resume) == {"depth": 2}
    text = (newer / "state.json").read_text()
    (newer / "state.json").write_text(text.replace('"depth": 2', '"depth": 3'))
    assert interrupted_run(checkpoints.folder, "auto") == {"depth": 2}
    assert interrupted_run(checkpoints.folder, str(newer)) is None
    assert interrupted_run(checkpoints.folder, str(checkpoints.folder / "step-00000030")) is None


def test_going_back_abandons_what_came_later(checkpoints):
    for step in (10, 20):
        save(checkpoints, step)
    save(checkpoints, 15)  # resumed from 10
    assert checkpoints.find("auto").step == 15
    assert [checkpoint.step for checkpoint in checkpoints.present()] == [10, 15]


def test_without_any_there_is_nothing_to_resume(checkpoints):
    assert checkpoints.find("auto") is None


def test_an_unfinished_or_unmarked_folder_is_not_a_checkpoint(checkpoints, capsys):
    save(checkpoints, 10)
    save(checkpoints, 20)
    (checkpoints.folder / "step-00000020" / "complete.json").unlink()
    unfinished = checkpoints.folder / ".step-00000030.unfinished"
    shutil.copytree(checkpoints.folder / "step-00000010", unfinished)
    assert checkpoints.find("auto").step == 10
    assert "complete.json is missing" in capsys.readouterr().err
    save(checkpoints, 20)  # overwrites the damaged one and clears away what was left
    assert checkpoints.find("auto").step == 20 and not unfinished.exists()


def files_of(checkpoint):
    return sorted(path for path in checkpoint.folder.iterdir())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_or_cut_is_detected_and_named(data, tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints", Accelerator(cpu=True))
    save(checkpoints, 10)
    save(checkpoints, 20)
    path = data.draw(st.sampled_from(files_of(checkpoints.present()[-1])))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        verify(path.parent)
    except Damaged as damage:
        assert path.name in str(damage) or path.name == "complete.json"
        assert checkpoints.find("auto").step == 10
    else:  # only the marker has bytes that mean nothing: spaces, letter case of an escape
        assert path.name == "complete.json"
        assert Checkpoint(path.parent).state == state_of(20)
    assert bytes(content) != before


def test_when_all_are_damaged_it_says_so(checkpoints):
    save(checkpoints, 10)
    (checkpoints.folder / "step-00000010" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="no good checkpoint is left.*model.safetensors has 5 bytes"):
        checkpoints.find("auto")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.find(str(checkpoints.folder / "step-00000010"))


def rewrite(folder, **changes):
    """Change state.json as if another version had written it; None removes a key."""
    path, marker = folder / "state.json", folder / "complete.json"
    state = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    files = json.loads(marker.read_text())["files"]
    files["state.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    marker.write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(("version", "named"), [(None, 1), (FORMAT - 1, FORMAT - 1), (FORMAT + 1, FORMAT + 1)])
def test_a_checkpoint_of_another_format_is_refused(checkpoints, version, named):
    save(checkpoints, 10)
    save(checkpoints, 20)
    folder = checkpoints.folder / "step-00000020"
    rewrite(folder, format=version)
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError) as refused:
            find_checkpoint(checkpoints, LoopArguments(resume=resume), {})
        said = str(refused.value)
        assert said.startswith(
            f"{folder} has checkpoint format {named}, this version of nanochat resumes format {FORMAT};"
        )
        assert "train from scratch with --overwrite_output_dir true and without --resume, or" in said
        assert "\n" not in said
    assert checkpoints.find(str(checkpoints.folder / "step-00000010")).state == state_of(10)


FILL_THE_DISK = """
    import resource, sys, torch
    from accelerate import Accelerator
    from modeling_nanochat.errors import UserError
    from recipes.training.checkpoint.checkpoints import Checkpoints, RunState
    checkpoints = Checkpoints(sys.argv[1], Accelerator(cpu=True))
    def save(step, numbers):
        checkpoints.save(step, RunState(), {"optimizer": {"a": torch.zeros(numbers)}}, lambda: {"w": torch.ones(8)})
        checkpoints.complete()
    save(10, 1000)
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(20, 1_000_000)
    except UserError as error:
        print(error)
        steps, unfinished = [c.step for c in checkpoints.present()], list(checkpoints.folder.glob(".*"))
        print(steps, checkpoints.find("auto").step, unfinished)
"""


def fill_the_disk(tmp_path, *prefix, limited=False):
    script = tmp_path / "fill.py"
    script.write_text(textwrap.dedent(FILL_THE_DISK))
    folder = tmp_path / "disk" / "checkpoints"
    command = [*prefix, sys.executable, str(script), str(folder), *(["limited"] if limited else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)


def small_disk(tmp_path):
    """A prefix that runs a command with a 1 MiB file system at tmp_path/disk; None where that is not allowed."""
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        return prefix if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode == 0 else None
    except OSError:
        return None


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path):
    prefix = small_disk(tmp_path)
    result = fill_the_disk(tmp_path, *(prefix or []), limited=prefix is None)
    reason = "No space left on device" if prefix else "File too large"
    said, left = result.stdout.splitlines()[-2:]
    assert reason in said and "step-00000010 is intact; free space, then --resume auto" in said, result.stderr
    assert left == "[10] 10 []"


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing is written until the event is set."""
    event, write = threading.Event(), module.write_files
    monkeypatch.setattr(module, "write_files", lambda *files: event.wait(60) and write(*files))
    yield event
    event.set()


def test_training_goes_on_while_its_earlier_state_is_written(checkpoints, slow_disk):
    weight, moments, state = torch.ones(3), torch.ones(2, 2).t(), RunState(learning={"losses": [1.0]})
    checkpoints.save(10, state, {"optimizer": {"m@0": moments}}, lambda: {"w": weight})
    assert checkpoints.being_written and checkpoints.find("auto") is None
    weight += 1
    moments += 1
    state.learning["losses"].append(2.0)
    slow_disk.set()
    checkpoints.complete()
    found = checkpoints.find("auto")
    assert torch.equal(found.weights()["w"], torch.ones(3)) and found.state.learning == {"losses": [1.0]}
    assert torch.equal(found.shards("optimizer")[0].get_tensor("m@0"), torch.ones(2, 2))
    assert not checkpoints.being_written
    checkpoints.complete()  # once more: nothing is left to do


def test_files_that_are_written_make_a_checkpoint_only_once_it_is_completed(checkpoints):
    checkpoints.save(10, RunState(), {}, lambda: {"w": torch.ones(1)})
    checkpoints.unfinished.files.result()
    assert not checkpoints.being_written and checkpoints.find("auto") is None
    checkpoints.complete()
    assert checkpoints.find("auto").step == 10


def test_a_second_save_waits_for_the_first(checkpoints, slow_disk):
    checkpoints.save(10, RunState(), {}, lambda: {"w": torch.ones(1)})
    threading.Timer(0.2, slow_disk.set).start()
    checkpoints.save(20, RunState(), {}, lambda: {"w": torch.ones(1)})
    assert checkpoints.find("auto").step == 10
    checkpoints.complete()
    assert [checkpoint.step for checkpoint in checkpoints.present()] == [10, 20]


def test_random_generators_go_on_as_they_were(checkpoints):
    device = torch.device("cpu")
    random.gauss(0, 1)
    np.random.standard_normal()
    save(checkpoints, 10)

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()

    first = draw()
    restore_random_state(checkpoints.find("auto"), checkpoints.accelerator)
    assert draw() == first
    states = random_state(device)
    first = draw()
    set_random_state(states, device)
    assert draw() == first


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.1),  # has a state of None
    "adafactor": Adafactor,  # counts steps in Python's integers
    "muon": lambda params: MuonAdamW([{"params": params, "kind": "muon", "lr": 0.1}]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_goes_on_as_it_was(make, tmp_path):
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3), torch.randn(5, 4, 3)

    def steps(weight, optimizer, numbers):
        for number in numbers:
            weight.grad = gradients[number].clone()
            optimizer.step()

    weight = torch.nn.Parameter(start.clone())
    undisturbed = make([weight])
    steps(weight, undisturbed, range(3))
    save_file(optimizer_state(undisturbed), tmp_path / "saved")
    resumed_weight = torch.nn.Parameter(weight.detach().clone())
    resumed = make([resumed_weight])
    load_optimizer_state(resumed, safe_open(tmp_path / "saved", "pt"))
    steps(weight, undisturbed, range(3, 5))
    steps(resumed_weight, resumed, range(3, 5))
    assert torch.equal(resumed_weight, weight) and not torch.equal(weight, start)
