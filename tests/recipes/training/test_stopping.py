"""An error on one of several processes ends all of them, soon and with one line. Gloo stands in for NCCL."""

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import training
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from conftest import random_model
from fsdp2 import sharded
from torch.multiprocessing import ProcessExitedException

from evals.harness.processes import ending_together
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.training import batch_size, stopping
from recipes.training.batch_size import find_batch_size
from recipes.training.stopping import Outcomes

SOON = 30.0  # seconds, the start of the processes included; gloo would wait for half an hour


def run_out_of_memory(in_layer: int, is_sharded: bool):
    """In the second process, in the middle of the pass, when the first waits for it or soon will."""
    from modeling_nanochat.modeling_nanochat import NanoChatMLP

    if is_sharded:
        sharded()
    if os.environ["RANK"] == "0":
        return
    forward, calls = NanoChatMLP.forward, 0

    def limited(self, hidden_states):
        nonlocal calls
        calls += self.training
        if calls == in_layer:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, hidden_states)

    NanoChatMLP.forward = limited


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_process_without_memory_in_a_training_step_ends_all_with_one_line(is_sharded, tmp_path):
    forks, world, said = training.forkserver(), training.write_world(tmp_path / "world"), tmp_path / "said"
    arguments = training.pretrain_arguments(world, tmp_path / "base", per_device_train_batch_size=2)
    started = time.monotonic()
    # two layers, two passes a step: in the second layer of the third step's first pass
    before = partial(run_out_of_memory, 10, is_sharded)
    assert training.run(forks, arguments, processes=2, before=before, says=said) == 1
    assert time.monotonic() - started < SOON
    text = said.read_text()
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert errors[0].startswith("error: out of memory with 2 rows of 32 tokens")
    assert "per_device_train_batch_size to 1" in errors[0]


def two_processes() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def fail_in_a_trial():
    """One process runs out of memory, the other waits for it within the pass."""
    rank = two_processes().process_index
    batch_size.peak_bytes = lambda function, device: function() or 0
    stopping.OUTCOME_SECONDS = 1.0

    def trial(rows: int) -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        dist.all_reduce(torch.ones(1))

    def main():
        with ending_together():
            find_batch_size(random_model("plain"), 256, 8, torch.device("cuda"), trial, Outcomes().smallest)

    exit_on_user_error(main)


def fail_alone(error: Exception | None):
    """The second process fails; the first is in a collective, or as in a loop over data."""
    rank = two_processes().process_index

    def main():
        with ending_together():
            if rank == 1:
                raise error
            dist.all_reduce(torch.ones(1))

    exit_on_user_error(main)


def fail_at_once():
    two_processes()

    def main():
        with ending_together():
            raise UserError("all processes have the same to say")

    exit_on_user_error(main)


@pytest.mark.parametrize(
    "work, said",
    [
        (fail_in_a_trial, "error: out of memory with 8 rows of 256 tokens"),
        (partial(fail_alone, UserError("a file is missing")), "error: a file is missing"),
        (partial(fail_alone, KeyError("a bug")), "Traceback (most recent call last)"),
        (fail_at_once, "error: all processes have the same to say"),
    ],
)
def test_the_first_that_fails_says_why_and_all_end(work, said, capfd):
    started = time.monotonic()
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        debug_launcher(work, (), num_processes=2)
    time.sleep(0.1)
    assert time.monotonic() - started < SOON
    errors = capfd.readouterr().err
    assert errors.count("error: ") + errors.count("Traceback") == 1 and said in errors, errors


def end_well(path):
    rank = two_processes().process_index
    with ending_together():
        dist.barrier()
    time.sleep(2 * stopping.POLL_SECONDS * rank)  # one is gone, with the store, before the other
    (path / str(rank)).touch()


def test_a_good_end_is_nobody_s_business(tmp_path):
    debug_launcher(end_well, (tmp_path,), num_processes=2)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_a_single_process_raises_as_usual():
    with pytest.raises(KeyError), ending_together():
        raise KeyError
