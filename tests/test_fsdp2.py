"""A model that FSDP2 has cut over processes: the same course as on one, and checkpoints that go both ways."""

import os

import pytest
import training

SETTINGS = {"max_steps": 12, "save_steps": 4, "eval_steps": 6, "sample_steps": 6, "per_device_train_batch_size": 2}


def sharded():
    """Accelerate has FSDP on accelerators only; here it is told, once it is set up, that processes on a CPU have it too."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    import recipes.pretrain

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    make_accelerator = recipes.pretrain.make_accelerator

    def make(*arguments):
        accelerator = make_accelerator(*arguments)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
        )
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        assert accelerator.is_fsdp2
        return accelerator

    recipes.pretrain.make_accelerator = make


def sharded_and_stopped():
    sharded()
    training.ask_to_stop_after_a_checkpoint()


@pytest.mark.parametrize("recipe", ["current", "classic"])
def test_a_run_moves_into_fsdp2_and_out_of_it(recipe, tmp_path):
    """One process without FSDP2, then two with it, each stopped by SIGTERM, then one again; two passes a step."""
    forks, world = training.forkserver(), training.write_world(tmp_path / "world")
    settings = SETTINGS | {"training_recipe": recipe}
    undisturbed, moved = tmp_path / "a" / "base", tmp_path / "b" / "base"
    assert training.run(forks, training.pretrain_arguments(world, undisturbed, **settings)) == 0

    arguments = training.pretrain_arguments(world, moved, **settings, resume="auto")
    assert training.run(forks, arguments, before=training.ask_to_stop_after_a_checkpoint) == 0
    assert training.newest_step(moved) == 5
    assert training.run(forks, arguments, processes=2, before=sharded_and_stopped) == 0
    assert training.newest_step(moved) == 9
    assert training.run(forks, arguments) == 0
    training.assert_the_same_course(moved, undisturbed)


def test_fsdp2_trains_from_start_to_end(tmp_path):
    forks, world = training.forkserver(), training.write_world(tmp_path / "world")
    one, two = tmp_path / "one" / "base", tmp_path / "two" / "base"
    assert training.run(forks, training.pretrain_arguments(world, one, **SETTINGS)) == 0
    assert training.run(forks, training.pretrain_arguments(world, two, **SETTINGS), processes=2, before=sharded) == 0
    training.assert_the_same_course(two, one)
    samples = [[row["samples"] for row in training.log_of(output) if "samples" in row] for output in (one, two)]
    assert len(samples[0]) == 2 and samples[0] == samples[1]
