"""Which optimizer trains: Muon with AdamW for all weights of this project's models, else TRL's, by TRL's keys.

Muon's groups are made for our architectures. The vectors of others, such as norms and biases, would get rates that
suit none of ours, and an adapter's thin matrices have nothing to orthogonalize.
"""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from modeling_nanochat.errors import UserError
from modeling_nanochat.registered import is_nanochat

from . import keys
from .trainer import RateArguments


def training_options(args: Any, model: PreTrainedModel, given: Collection[str]) -> dict[str, Any]:
    """The trainer's arguments `muon_rates` (None: TRL's optimizer) and `peft_config` (None: all weights are trained).

    Args:
        args: The stage's, with [`RateArguments`] and `AdapterArguments`.
        given: Keys in the --config file or on the command line.

    Raises:
        UserError: A given key belongs to the other optimizer, or PEFT rejects its settings.
    """
    adapter = args.adapter(model)
    with_muon = adapter is None and is_nanochat(model)
    check_given(given, with_muon, "an adapter" if adapter else f"a {model.config.model_type} model")
    return {"muon_rates": args.scaled() if with_muon else None, "peft_config": adapter}


def check_given(given: Collection[str], with_muon: bool, what: str) -> None:
    """Raise [`UserError`] for a given key that belongs to the other optimizer.

    Args:
        what: What is trained, for people.
    """
    rates = {each.name for each in fields(RateArguments)}
    for key in given:
        if with_muon and key in keys.OPTIMIZER:
            raise UserError(f"{key} would have no effect: {keys.MUON}")
        if not with_muon and key in rates:
            raise UserError(f"{key} would have no effect: {what} is trained by TRL's optimizer; set learning_rate")
