"""Where training computes, in which numbers, and whether compiled: float32, bfloat16 over float32 weights, or float8 in the
large layers.

Determined automatically: bfloat16 on CUDA devices that compute in it, float32 elsewhere. A launch file's `mixed_precision`
decides where there is one. Models are compiled where `torch.compile` works on this machine.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs, DynamoBackend, convert_model_to_fp8_ao
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.other import is_compiled_module
from torch import nn
from torch.distributed.fsdp import FSDPModule

from modeling_nanochat.errors import UserError

SMALLEST_FLOAT8_SIDE = 128
FLOAT8_TILE = 16
FLOAT8_CAPABILITY = (8, 9)


def accelerator_options() -> dict[str, object]:
    """Keyword arguments of `Accelerator`: device and precision. Float32 products may use TF32 from here on.

    Raises:
        UserError: float16, or float8 where it cannot run.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or found_precision()
    if precision == "fp16":
        raise UserError("mixed_precision fp16: the model leaves float16's range; take bf16, or no for float32")
    if on_cuda():
        torch.set_float32_matmul_precision("high")
    options = {"mixed_precision": precision} | ({"cpu": True} if several_on_cpu() else {})
    return options | ({"kwargs_handlers": [float8_recipe()]} if precision == "fp8" else {})


def let_segments_grow() -> None:
    """Have CUDA's allocator extend its segments, which evaluations between steps would else leave in pieces.

    Before anything is allocated there. What the user has set stays.
    """
    if sys.platform == "linux" and not any(name.endswith("_ALLOC_CONF") for name in os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def several_on_cpu() -> bool:
    """Whether there are several processes (by torchrun) and no device on which they can work together.

    Accelerate has to be told, or each would train on its own, in silence. Apple's GPUs know no collectives.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.accelerator.current_accelerator(check_available=True)
    return several and (device is None or device.type == "mps")


def found_precision() -> str:
    """bf16 on a CUDA device that has it in hardware; CPUs and Apple's GPUs compute in float32, as in the original."""
    return "bf16" if on_cuda() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def on_cuda() -> bool:
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def float8_recipe() -> AORecipeKwargs:
    """Accelerate's recipe by torchao: products of the large layers in float8, scaled anew for each tensor.

    Raises:
        UserError: The device has no float8, or torchao is missing. (Accelerate would go on in float16.)
    """
    if not on_cuda() or (torch.version.cuda and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY):
        raise UserError("mixed_precision fp8 needs a GPU with float8 (compute capability 8.9 or more); take bf16")
    # All-gathering in float8 replaces the weights by tensors of another class, in which optimizers made before do not
    # find theirs; Accelerate's launcher asks for it unless told otherwise.
    gather = parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env(
        "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"
    )
    try:
        return AORecipeKwargs(module_filter_func=computes_in_float8, enable_fsdp_float8_all_gather=gather)
    except ImportError as error:
        raise UserError("mixed_precision fp8 needs torchao: pip install torchao; or take bf16") from error


def computes_in_float8(module: nn.Module, name: str) -> bool:
    """Whether the layer's products run in float8: linear, both sides divisible by 16 and at least 128; not the head.

    Float8 products need the former; smaller ones lose more by scaling than they gain. The head's product belongs to the
    chunked loss, which takes the weight itself; the original found float8 there of no use.
    """
    if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
        return False
    sides = (module.in_features, module.out_features)
    return min(sides) >= SMALLEST_FLOAT8_SIDE and all(side % FLOAT8_TILE == 0 for side in sides)


def convert_to_float8(model: nn.Module, accelerator: Accelerator) -> None:
    """Put float8 layers into `model` where the precision asks for them; parameters and their names stay.

    `accelerator.prepare` does this by itself, `accelerator.prepare_model` does not.
    """
    recipe = accelerator.ao_recipe_handler
    if recipe is not None:
        convert_model_to_fp8_ao(model, config=recipe.config, module_filter_func=recipe.module_filter_func)


@contextmanager
def evaluation_precision(model: nn.Module) -> Iterator[None]:
    """In this context float8 layers are plain linear layers, of whatever precision autocast has: bfloat16.

    They change their class for a while. So weights stay where they are, and a compiled model, called only outside, does
    not compile again.
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
    """By name, for torchao is not installed everywhere."""
    return type(module).__name__ == "Float8Linear" and isinstance(module, nn.Linear)


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
