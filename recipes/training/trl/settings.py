"""TRL's argument classes as the two stages use them, and the checks of what is given.

No key is accepted without effect: `recipes/training/trl/keys.py` lists all of them.
"""

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import yaml
from accelerate.utils.environment import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig, SFTConfig, TrlParser

from evals.harness.processes import several_on_cpu
from modeling_nanochat.cli import config_path, parse
from modeling_nanochat.errors import UserError

from ..batch_size import is_out_of_memory
from . import keys

PROBLEMS_PER_STEP = 16


def fill_device_defaults(settings: TrainingArguments) -> None:
    """Fill in unset values before the libraries do, which assume that bfloat16 and pinned memory are available.

    Raises:
        ValueError: bf16 is set on a device without it.
    """
    settings.use_cpu = settings.use_cpu or several_on_cpu()
    able = settings.use_cpu or is_torch_bf16_gpu_available()
    if settings.bf16 is None:
        settings.bf16 = able and not settings.use_cpu
    elif settings.bf16 and not able:
        raise ValueError("bf16 is not available on this device: leave it out, or set use_cpu to use it on the CPU")
    if settings.dataloader_pin_memory is None:
        settings.dataloader_pin_memory = torch.cuda.is_available() and not settings.use_cpu
    if settings.ddp_find_unused_parameters is None:
        settings.ddp_find_unused_parameters = False  # all parameters are used; searching takes time
    if hasattr(settings, "activation_checkpointing"):  # transformers 5.24 renamed it, and warns about the old name
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            value = getattr(settings, new)
            setattr(settings, new, getattr(settings, old) if value is None else value)
            setattr(settings, old, None)


@dataclass
class DeviceDefaults:
    """Settings of both stages whose defaults differ from the libraries'."""

    bf16: bool | None = field(default=None, metadata={"help": "Train in bfloat16; default: if the GPU supports it."})
    dataloader_pin_memory: bool | None = field(default=None, metadata={"help": "Default: if there is a CUDA GPU."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )


@dataclass
class SFTSettings(DeviceDefaults, SFTConfig):  # type: ignore[misc]  # None only until `fill_device_defaults`
    """`trl.SFTConfig` that starts on any device."""

    max_length: int | None = field(default=None, metadata={"help": "Tokens per row; default: the context or 2048."})
    packing: bool = field(
        default=True, metadata={"help": "Fill rows with whole conversations that do not see each other; false: pad."}
    )
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between losses on held-out conversations."})
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Rows or prompts per forward pass of an evaluation."}
    )

    def __post_init__(self) -> None:
        fill_device_defaults(self)
        super().__post_init__()


@dataclass
class GRPOSettings(DeviceDefaults, GRPOConfig):  # type: ignore[misc]  # None only until `__post_init__`
    """`trl.GRPOConfig` that starts on any device, with the original's algorithm as default: on-policy, no KL."""

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the problems."})
    gradient_accumulation_steps: int | None = field(  # type: ignore[assignment]  # None only until `__post_init__`
        default=None, metadata={"help": f"Default: for steps of {PROBLEMS_PER_STEP} problems."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0: do not."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions of each problem."})
    max_completion_length: int | None = field(default=256, metadata={"help": "Tokens, the tool's output included."})
    top_k: int = field(default=50, metadata={"help": "Sample among so many tokens; 0: among all."})
    scale_rewards: str = field(default="none", metadata={"help": "Divide advantages by a deviation: group or batch."})
    loss_type: str = field(
        default="per_problem", metadata={"help": "The original's, every problem counts equally; or one of TRL's."}
    )
    log_completions: bool = field(default=True, metadata={"help": "Write some of each logged step to a text file."})
    eval_steps: float | None = field(default=60, metadata={"help": "Steps between evaluations on eval_files."})

    def __post_init__(self) -> None:
        fill_device_defaults(self)
        if self.gradient_accumulation_steps is None:
            rows = self.per_device_train_batch_size
            self.gradient_accumulation_steps = passes_of_a_step(PROBLEMS_PER_STEP * (self.num_generations or 1), rows)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`use_transformers_paged`", FutureWarning)  # the printed line tells
            super().__post_init__()


def passes_of_a_step(rows: int, per_device: int, processes: int | None = None) -> int:
    """How many passes of `per_device` rows in each process make a step of `rows`, or more where they do not divide."""
    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # the trainer's state, which knows, does not exist yet
    return max(1, rows // (per_device * processes))


def parse_settings(
    arguments: type, settings: type, args: Sequence[str] | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Parse command line and --config file into instances of both classes and a dictionary of the given keys.

    Args:
        arguments: The stage's own dataclass.
        settings: [`SFTSettings`] or [`GRPOSettings`].

    Raises:
        UserError: A given key would have no effect, or a value is out of range; the message names the key.
    """
    words = list(sys.argv[1:] if args is None else args)
    given = given_values((arguments, settings), words)
    base = SFTConfig if issubclass(settings, SFTConfig) else GRPOConfig
    refuse_without_effect(given, base, own={option.name for option in fields(arguments)})
    check_values(given, base)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError(
            "fsdp: SFT and GRPO keep a full model on each process; launch with accelerate_configs/ddp_8gpu.yaml"
        )
    with settings_errors():
        parsed, filled = parse(arguments, settings, args=words)
    check_trackers(filled.report_to)
    check_needs(given, parsed, filled)
    return parsed, filled, given


def check_needs(given: Collection[str], *settings: Any) -> None:
    """Raise [`UserError`] for the first given key that nothing reads, because of the values of others."""
    for others, values, dependent in keys.NEEDS:
        found = [getattr(each, name) for name in others.split(" or ") for each in settings if hasattr(each, name)]
        met = not found or any(value in values if values else value for value in found)  # not found: another stage's
        if not met and (useless := [key for key in dependent if key in given]):
            wanted = " or ".join(word if isinstance(word, str) else word[0] for word in values) or "set"
            raise UserError(f"{useless[0]} has no effect unless {others} is {wanted}: set that, or leave it out")


def given_values(dataclass_types: Sequence[Any], words: list[str]) -> dict[str, Any]:
    """Key -> value of everything in the --config file or on the command line, even if it equals the default.

    Empty if the parser rejects something: [`parse`] reports it.
    """

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(dataclass_types)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    try:
        if config := config_path(words):
            with open(config, encoding="utf-8") as file:
                content = yaml.safe_load(file)
            parser.set_defaults(**{key: value for key, value in content.items() if key != "env"})
        return vars(parser.parse_known_args(words)[0])
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def refuse_without_effect(given: Collection[str], base: type, own: Collection[str]) -> None:
    """Raise [`UserError`] for the first key that is neither the stage's own, nor handled, nor passed on."""
    allowed = keys.HANDLED | keys.HANDLED_BY[base] | keys.PASSED_ON | keys.PASSED_ON_BY[base]
    refused = [*keys.INSTEAD.items(), *keys.INSTEAD_BY[base].items()]
    instead = {key: text for text, listed in refused for key in listed}
    for key in given:
        if key not in allowed and key not in own:
            unknown = f"this key of the installed {base.__module__.split('.')[0]} is untested here: leave it out"
            raise UserError(f"{key} would have no effect: {instead.get(key, unknown)}")


def check_values(given: dict[str, Any], base: type) -> None:
    """Raise [`UserError`] for the first value that the libraries would reject late or with a traceback."""
    if given.get("max_steps", 1) < 1 and given["max_steps"] != -1:
        raise UserError(f"max_steps {given['max_steps']} trains nothing: give at least 1, or -1 for num_train_epochs")
    for key, value in given.items():
        if key in keys.RANGES and isinstance(value, int | float):
            low, high = keys.RANGES[key]
            if not low <= value <= high or math.isinf(value):
                bounds = "more than 0" if low == keys.TINY else f"at least {low}"
                bounds += "" if math.isinf(high) else f" and at most {high}"
                raise UserError(f"{key} must be {bounds}, not {value}")
        choices = keys.LOSSES[base] if key == "loss_type" else keys.CHOICES.get(key)
        if choices and value is not None and value not in choices:
            raise UserError(f"{key} {value}: there are only {', '.join(choices)}")
        if key in keys.DICTIONARIES and isinstance(value, str):
            check_dictionary(key, value)


def check_dictionary(key: str, text: str) -> None:
    try:
        is_dictionary = isinstance(json.loads(text), dict)
    except ValueError:
        is_dictionary = False
    if not is_dictionary:
        raise UserError(f"{key} must be a JSON object, such as '{{\"name\": 1}}', not {text!r}")


def check_trackers(names: list[str]) -> None:
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"report_to {' '.join(names)}: {' '.join(str(error).split())}") from error


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn a library's errors about its settings into a [`UserError`]."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the trainer rejects its settings: {' '.join(str(error).split())}") from error
