"""Device, precision and compilation: float32, bfloat16 over float32 weights, or float8 in the large layers.

Determined automatically: bfloat16 on CUDA devices that support it, float32 elsewhere. A launch file's
`mixed_precision` takes precedence. Models are compiled if `torch.compile` works on this machine.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs, DynamoBackend, convert_model_to_fp8_ao
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.other import is_compiled_module
from torch import nn
from torch.distributed.fsdp import FSDPModule

from evals.harness.processes import several_on_cpu
from modeling_nanochat.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

SMALLEST_FLOAT8_SIDE = 128
FLOAT8_TILE = 16
FLOAT8_CAPABILITY = (8, 9)


def accelerator_options() -> dict[str, object]:
    """Keyword arguments of `Accelerator`: device and precision. Also allows TF32 for float32 matrix products.

    Raises:
        UserError: The precision is float16, or float8 where it cannot run.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or default_precision()
    if precision == "fp16":
        raise UserError("mixed_precision fp16: the model leaves float16's range; take bf16, or no for float32")
    if on_cuda():
        torch.set_float32_matmul_precision("high")
    options = {"mixed_precision": precision} | ({"cpu": True} if several_on_cpu() else {})
    return options | ({"kwargs_handlers": [float8_recipe()]} if precision == "fp8" else {})


def let_segments_grow() -> None:
    """Use expandable segments in CUDA's allocator: evaluations between steps would otherwise fragment memory.

    Call it before the first allocation. The user's own setting is kept.
    """
    if sys.platform == "linux" and not any(name.endswith("_ALLOC_CONF") for name in os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def default_precision() -> str:
    """bf16 on a CUDA device with hardware support; CPUs and Apple's GPUs compute in float32, as in the original."""
    return "bf16" if on_cuda() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def on_cuda() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def float8_recipe() -> AORecipeKwargs:
    """Accelerate's torchao recipe: matrix products of the large layers in float8, with dynamic tensorwise scaling.

    Raises:
        UserError: The device has no float8, or torchao is missing. (Accelerate would fall back to float16.)
    """
    if not on_cuda() or (torch.version.cuda and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY):
        raise UserError("mixed_precision fp8 needs a GPU with float8 (compute capability 8.9 or more); take bf16")
    # All-gathering in float8 replaces the weights by a tensor subclass, which optimizers created before do not know;
    # Accelerate's launcher turns it on by default.
    gather = parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env(
        "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"
    )
    try:
        return AORecipeKwargs(module_filter_func=computes_in_float8, enable_fsdp_float8_all_gather=gather)
    except ImportError as error:
        raise UserError("mixed_precision fp8 needs torchao: pip install torchao; or take bf16") from error


def computes_in_float8(module: nn.Module, name: str) -> bool:
    """Whether the layer computes in float8: linear, both sides divisible by 16 and at least 128; not the head.

    Float8 products require the former; smaller ones lose more by scaling than they gain. The head's product is part of
    the chunked loss, which reads the weight directly; the original found float8 useless there.
    """
    if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
        return False
    sides = (module.in_features, module.out_features)
    return min(sides) >= SMALLEST_FLOAT8_SIDE and all(side % FLOAT8_TILE == 0 for side in sides)


def convert_to_float8(model: nn.Module, accelerator: Accelerator) -> None:
    """Convert layers of `model` to float8 if the precision is fp8; parameters and their names do not change.

    `accelerator.prepare` does this automatically, `accelerator.prepare_model` does not.
    """
    recipe = accelerator.ao_recipe_handler
    if recipe is not None:
        convert_model_to_fp8_ao(model, config=recipe.config, module_filter_func=recipe.module_filter_func)


@contextmanager
def evaluation_precision(model: nn.Module) -> Iterator[None]:
    """Within the block, float8 layers are ordinary linear layers in autocast's precision, bfloat16.

    Only their class is swapped: weights stay in place, and a compiled model, called only outside, is not recompiled.
    """
    layers = [(module, type(module)) for module in model.modules() if is_float8(module)]
    for module, _ in layers:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module, float8 in layers:
            module.__class__ = float8


def is_float8(module: nn.Module) -> bool:
    """Compared by name, because torchao may not be installed."""
    return type(module).__name__ == "Float8Linear" and isinstance(module, nn.Linear)


def compiler_available(device_type: str = "cpu") -> tuple[bool, str]:
    """Whether a function compiles and gives the same result as in eager mode; if not, the reason in one line.

    Tested by compiling: a compiler may be missing, not executable, for another architecture, or incompatible with
    Triton; no list of checks is complete. Takes a few seconds.

    Args:
        device_type: "cuda" (needs Triton), "cpu" (needs a C++ compiler) or "mps".
    """
    numbers = torch.arange(8.0, device=device_type)
    try:
        compiled = torch.compile(doubled_sum, dynamic=False, fullgraph=True)(numbers).item()
    except Exception as error:  # any error means no
        torch.compiler.reset()
        return False, one_line(error)
    works = compiled == doubled_sum(numbers).item()
    return works, "" if works else "compiled functions give wrong results"


def doubled_sum(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sum()


def one_line(error: BaseException) -> str:
    """The first non-empty line, which says what is missing; a hundred lines of advice may follow."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def maybe_compile(model: Model, wanted: bool | None, accelerator: Accelerator) -> Model:
    """`model` compiled; or `model` itself, with a printed line that says why.

    Shapes are static: every training batch has the same. Evaluation and samples, whose shapes vary, call the
    uncompiled model, which shares its weights with the compiled one. A model sharded by FSDP2 is compiled layer by
    layer.

    Args:
        wanted: Whether to compile; None: if it works.

    Raises:
        UserError: Compilation is required and does not work.
    """
    if wanted is False:
        return model
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO and not isinstance(model, FSDPModule):
        return model  # Accelerate has compiled it, by the launch file's `dynamo_config`
    works, reason = compiler_available(accelerator.device.type)
    if works:
        if not isinstance(model, FSDPModule):
            return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # typed as a function
        compile_parts(model)
        return model
    if wanted:
        raise UserError(f"torch_compile: no compiler works here ({reason}); install g++ or clang++, or leave it out")
    accelerator.print(f"training runs uncompiled: {reason}")
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether [`maybe_compile`], or Accelerate by its launch file, compiles `module` in training."""
    return is_compiled_module(module) or (isinstance(module, FSDPModule) and "chunked_loss" in vars(module))


def compile_parts(model: nn.Module) -> None:
    """Compile each layer and the loss separately, in place.

    FSDP2's hooks, which gather and free weights around the layers, would break a graph of the full model. Layers of
    one kind share a graph.
    """
    methods = [(layer, "forward") for layer in model.get_submodule("model.layers").children()]
    for module, name in [*methods, (model, "chunked_loss")]:
        setattr(module, name, compiled_in_training(module, getattr(module, name)))


def compiled_in_training(module: nn.Module, method: Callable) -> Callable:
    """`method`, compiled while `module` is in training mode; evaluations call the same module with varying shapes."""
    compiled = torch.compile(method, dynamic=False)

    def call(*args: object, **kwargs: object) -> object:
        return (compiled if module.training else method)(*args, **kwargs)

    return call
