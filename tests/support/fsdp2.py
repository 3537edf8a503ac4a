"""FSDP2 on a CPU."""

import os

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def with_fsdp2(accelerator: Accelerator, **options: object) -> Accelerator:
    usual = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "SHARDED_STATE_DICT"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **usual | options)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2
    return accelerator


def sharded():
    """Enable FSDP2 on a CPU. Accelerate only supports it on accelerators, so its state is patched after setup."""
    import recipes.pretrain

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    make_accelerator = recipes.pretrain.make_accelerator

    def make(*arguments):
        return with_fsdp2(make_accelerator(*arguments))

    recipes.pretrain.make_accelerator = make
