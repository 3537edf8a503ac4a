"""The state of any torch optimizer as named tensors, if every process has all of it, as under DDP."""

from typing import Any

import torch
from safetensors import safe_open


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state by `{index of the parameter}.{key}`, without options such as learning rates."""
    states = optimizer.state_dict()["state"].items()
    values = {f"{index}.{key}": value for index, state in states for key, value in state.items()}
    return {name: as_tensor(value) for name, value in values.items() if value is not None}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: safe_open) -> None:
    """Restore what [`optimizer_state`] returned for an optimizer of the same parameters."""
    states: dict[int, dict[str, Any]] = {}
    for name in saved.keys():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = as_saved(saved.get_tensor(name))
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def as_tensor(value: torch.Tensor | float) -> torch.Tensor:
    """The value itself, or a number in Python's precision, in which no optimizer holds a tensor of one number."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def as_saved(tensor: torch.Tensor) -> torch.Tensor | float:
    if tensor.ndim or tensor.dtype != torch.float64:
        return tensor
    number = float(tensor)
    return int(number) if number.is_integer() else number
