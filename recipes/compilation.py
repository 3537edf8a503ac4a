"""Whether `torch.compile` works on this machine, and its use where it does."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_compiled_module
from torch import nn
from torch.distributed.fsdp import FSDPModule

from modeling_nanochat.errors import UserError


def compiler_available(device_type: str = "cpu") -> tuple[bool, str]:
    """Whether a function compiles and gives what it gives eagerly; if not, why, in one line.

    Found out by doing it: a compiler may be missing, not executable, of another architecture, or Triton of another
    version; no list of checks is complete. Takes some seconds.

    Args:
        device_type: "cuda" (needs Triton), "cpu" (needs a C++ compiler) or "mps".
    """
    numbers = torch.arange(8.0, device=device_type)
    try:
        compiled = torch.compile(doubled_sum, dynamic=False, fullgraph=True)(numbers).item()
    except Exception as error:  # whatever it is, the answer is no
        torch.compiler.reset()
        return False, one_line(error)
    works = compiled == doubled_sum(numbers).item()
    return works, "" if works else "compiled functions give wrong results"


def doubled_sum(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sum()


def one_line(error: BaseException) -> str:
    """The first line, which says what is missing; a hundred lines of advice follow it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def maybe_compile(model: nn.Module, wanted: bool | None, accelerator: Accelerator) -> nn.Module:
    """`model` compiled, or `model` itself with one printed line that says why.

    Shapes are static: every training batch has the same one. What changes shapes (evaluation, samples) calls the
    uncompiled model, whose weights the compiled one shares. A model that FSDP2 has sharded is compiled in parts.

    Args:
        wanted: Compile or not; None: where it works.

    Raises:
        UserError: It is wanted by name and does not work.
    """
    if wanted is False:
        return model
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO and not isinstance(model, FSDPModule):
        return model  # Accelerate has compiled it, by the launch file's `dynamo_config`
    works, reason = compiler_available(accelerator.device.type)
    if works:
        return compile_parts(model) if isinstance(model, FSDPModule) else torch.compile(model, dynamic=False)
    if wanted:
        raise UserError(f"torch_compile: no compiler works here ({reason}); install g++ or clang++, or leave it out")
    accelerator.print(f"training runs uncompiled: {reason}")
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether [`maybe_compile`], or Accelerate by its launch file, compiles what `module` computes in training."""
    return is_compiled_module(module) or (isinstance(module, FSDPModule) and "chunked_loss" in vars(module))


def compile_parts(model: FSDPModule) -> FSDPModule:
    """Compile each layer and the loss by themselves, in place.

    FSDP2's hooks gather and free the weights around the layers, where they would break one graph of the whole model. Layers
    of one kind share a graph.
    """
    for layer in model.base_model.layers:
        layer.forward = compiled_in_training(layer, layer.forward)
    model.chunked_loss = compiled_in_training(model, model.chunked_loss)
    return model


def compiled_in_training(module: nn.Module, method: Callable) -> Callable:
    """`method`, compiled while `module` is in training; evaluations call the same module with ever other shapes."""
    compiled = torch.compile(method, dynamic=False)

    def call(*args: object, **kwargs: object) -> object:
        return (compiled if module.training else method)(*args, **kwargs)

    return call
