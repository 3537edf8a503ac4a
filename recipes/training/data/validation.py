"""Held-out conversations: a mixture of their own, or a share of those to train on."""

import random
from collections import Counter
from dataclasses import dataclass, field

from modeling_nanochat.errors import UserError
from recipes.training.optim.overrides import check_ranges

from .conversations import Renderer
from .mixtures import FIRST_RECORDS, MixtureArguments, check_beginnings, parse_mixture, read_mixture
from .packing import Conversation


@dataclass(kw_only=True)
class ValidationArguments(MixtureArguments):
    """The conversations of a stage, and those that it is evaluated on."""

    validation_mixture: list[str] | None = field(
        default=None, metadata={"help": "Held-out conversations, as `mixture`; or give validation_share."}
    )
    validation_share: float | None = field(
        default=None,
        metadata={"help": "Fraction of the conversations held out, at least one."},
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: An entry is malformed, or keys exclude each other.
        """
        super().__post_init__()
        parse_mixture(self.validation_mixture or [], "validation_mixture")
        if self.validation_mixture and self.validation_share is not None:
            raise UserError("validation_share has no effect with validation_mixture; leave one of them out")
        check_ranges(positive={}, not_negative={}, shares={"validation_share": self.validation_share})

    def check_beginnings(self) -> None:
        """Raise [`UserError`] if the first records of a source would be refused, before the model is read."""
        super().check_beginnings()
        held_out = parse_mixture(self.validation_mixture or [], "validation_mixture")
        check_beginnings(held_out, FIRST_RECORDS, (), self.on_bad_row)

    def train_and_validation_sets(self, render: Renderer, seed: int) -> tuple[list[Conversation], list[Conversation]]:
        """The rendered conversations to train and to validate on, the latter empty if neither key is given.

        Raises:
            UserError: A source or a row is bad, or nothing is left to train or to validate on.
        """
        conversations = self.conversations(render, seed)
        if self.validation_mixture:
            held_out = parse_mixture(self.validation_mixture, "validation_mixture")
            return conversations, read_mixture(held_out, render, seed, "validation_mixture", self.max_rows)
        if self.validation_share is None:
            return conversations, []
        return split(conversations, self.validation_share, seed)


def split(
    rendered: list[Conversation], validation_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Random split into training and validation conversations, at least one for validation.

    A conversation that a mixture repeats, as the same object, is in one of them only, and once in validation.

    Raises:
        UserError: Fewer than two conversations, or none left to train on.
    """
    times = Counter(map(id, rendered))
    different = list({id(conversation): conversation for conversation in rendered}.values())
    if len(different) < 2:
        raise UserError("train_files: at least two conversations are needed, one of them for validation")
    shuffled = random.Random(seed).sample(different, len(different))
    held_out = max(1, round(validation_share * len(shuffled)))
    if held_out == len(shuffled):
        raise UserError(f"validation_share {validation_share} leaves no conversation to train on; lower it")
    train_set = [conversation for conversation in shuffled[held_out:] for _ in range(times[id(conversation)])]
    return train_set, shuffled[:held_out]
