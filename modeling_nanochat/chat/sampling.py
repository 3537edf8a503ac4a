"""Sampling options with their ranges, and the choice of each row's next token.

The options have the names and effects of transformers' logits processors; each row of a batch may have its own.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import UserError

GREEDY_BELOW = 1e-5  # only one token is likely there, and smaller divisors make logits infinite


@dataclass(frozen=True)
class Setting:
    """Meaning and range of a number; the commands, the page and Python share it."""

    help: str
    lowest: float
    highest: float = math.inf
    integer: bool = False
    optional: bool = False  # None is allowed


def option(default: float | None, *setting: Any, **kind: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(*setting, **kind)})


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of a reply are chosen, and which texts end it.

    A new option is a line here and its effect in [`filter_logits`]; the terminal's flags and commands follow.

    Raises:
        UserError: An option is of the wrong type or out of its range.
    """

    temperature: float = option(0.6, "0 always takes the most likely token", 0, 2)
    top_k: int | None = option(50, "sample among the most likely tokens, 0: among all", 0, integer=True, optional=True)
    top_p: float = option(1.0, "sample among the most likely tokens that together have this probability", 0, 1)
    min_p: float = option(0.0, "exclude tokens less likely than this fraction of the most likely one", 0, 1)
    repetition_penalty: float = option(1.0, "above 1, tokens that already occurred become less likely", 0.1, 10)
    stop_strings: tuple[str, ...] = ()  # the reply ends before the first of them

    def __post_init__(self):
        for name in OPTIONS:
            check_setting(name, getattr(self, name))
        stops = self.stop_strings
        if not isinstance(stops, tuple) or not all(isinstance(text, str) and text for text in stops):
            raise UserError(f"stop_strings must be a tuple of texts that are not empty, not {stops!r:.60}")

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> "SamplingOptions":
        """The options that `config` sets; this class's defaults for the others."""
        found = {name: value for name in OPTIONS if (value := getattr(config, name, None)) is not None}
        if config.do_sample is False:
            found["temperature"] = 0
        stops = config.stop_strings or []
        return cls(**found, stop_strings=tuple(stops if isinstance(stops, list) else [stops]))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


OPTIONS = {entry.name: entry.metadata["setting"] for entry in fields(SamplingOptions) if entry.metadata}
SETTINGS = OPTIONS | {
    "max_new_tokens": Setting("maximum tokens of a reply", 1, integer=True),
    "seed": Setting("makes replies reproducible", 0, 2**63 - 1, integer=True, optional=True),
}


def check_setting(name: str, value: object) -> None:
    """Raise [`UserError`] unless `value` has the setting's type and is within its range."""
    setting = SETTINGS[name]
    if value is None and setting.optional:
        return
    kind = Integral if setting.integer else Real
    in_range = isinstance(value, kind) and setting.lowest <= value <= setting.highest  # NaN fails too
    if isinstance(value, bool) or not in_range:
        raise UserError(f"{name} must be {describe(name)}, not {value!r:.60}")


def describe(name: str) -> str:
    setting = SETTINGS[name]
    number = "a whole number" if setting.integer else "a number"
    if setting.highest == math.inf:
        return f"{number} of at least {setting.lowest}"
    return f"{number} from {setting.lowest} to {setting.highest}"


MOST_LIKELY = SamplingOptions(temperature=1, top_k=1)  # filters a greedy row's logits without dividing by 0


@dataclass(frozen=True)
class Sampler:
    """Chooses one token per row, each row independently and by its own options."""

    generator: torch.Generator

    def __call__(
        self,
        logits: torch.Tensor,
        options: SamplingOptions | Sequence[SamplingOptions],
        seen: Sequence[Collection[int]] = (),
        generators: Sequence[torch.Generator | None] = (),
    ) -> torch.Tensor:
        """Logits (rows, vocabulary) -> token ids (rows,).

        Args:
            options: One for all rows, or one per row.
            seen: The ids that each row contains so far; needed by `repetition_penalty` only.
            generators: One per row, or none: a row with its own draws the same whatever the other rows are.
        """
        options = [options] * len(logits) if isinstance(options, SamplingOptions) else options
        if any(generators):
            rows = zip(logits, options, seen, generators, strict=True)
            alone = [Sampler(own or self.generator)(row[None], [option], [ids]) for row, option, ids, own in rows]
            return torch.cat(alone)
        logits = penalize_repetition(logits.float(), options, seen)
        most_likely = logits.argmax(-1)
        greedy = [row.is_greedy for row in options]
        if all(greedy):
            return most_likely
        options = [MOST_LIKELY if row.is_greedy else row for row in options]
        filtered, ids = filter_logits(logits, options)
        choice = torch.multinomial(filtered.softmax(-1), 1, generator=self.generator)
        return torch.where(column(greedy, logits), most_likely[:, None], ids.gather(1, choice)).squeeze(1)


def penalize_repetition(
    logits: torch.Tensor, options: Sequence[SamplingOptions], seen: Sequence[Collection[int]]
) -> torch.Tensor:
    """Logits (rows, vocabulary) in which each row's `seen` ids are less likely by its `repetition_penalty`."""
    penalties = [row.repetition_penalty for row in options]
    if set(penalties) == {1}:
        return logits
    pairs = [(row, token) for row, ids in enumerate(seen) for token in ids]
    rows, tokens = torch.tensor(pairs, dtype=torch.long, device=logits.device).reshape(-1, 2).unbind(1)
    occurred = torch.zeros_like(logits, dtype=torch.bool)
    occurred[rows, tokens] = True
    penalty = column(penalties, logits)
    return torch.where(occurred, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: torch.Tensor, options: Sequence[SamplingOptions]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens left to choose among, by transformers' processors in its order; no row may be greedy.

    Args:
        logits: (rows, vocabulary).
        options: One per row.

    Returns:
        Logits (rows, n) divided by the temperature, -inf where a row excludes the token, and their ids (rows, n). All
        other tokens are excluded in every row.
    """
    logits = logits / column([row.temperature for row in options], logits)
    logits, ids = candidates(logits, options)
    logits = filter_top_k(logits, [row.top_k for row in options])
    logits = filter_top_p(logits, [row.top_p for row in options])
    return filter_min_p(logits, [row.min_p for row in options]), ids


def candidates(logits: torch.Tensor, options: Sequence[SamplingOptions]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids (rows, n) of the tokens that some `top_k` keeps, most likely first; all, unsorted, if one is off.

    Also all with `top_p`: which of equally likely tokens it keeps depends on the order of the whole vocabulary.
    """
    vocabulary = logits.shape[1]
    if any(not row.top_k or row.top_p < 1 for row in options):
        return logits, torch.arange(vocabulary, device=logits.device).expand(logits.shape)
    count = min(max(row.top_k or vocabulary for row in options), vocabulary)
    values, ids = logits.topk(min(count + 1, vocabulary))
    if count < vocabulary and (values[:, -2] == values[:, -1]).any():  # tokens as likely as the last one are kept
        count = int((logits >= values[:, -2:-1]).sum(-1).max())
        values, ids = logits.topk(count)
    return values[:, :count], ids[:, :count]


def filter_top_k(logits: torch.Tensor, top_k: Sequence[int | None]) -> torch.Tensor:
    counts = [min(count or logits.shape[1], logits.shape[1]) for count in top_k]
    if min(counts) == logits.shape[1]:
        return logits
    lowest = logits.topk(max(counts)).values.gather(1, column(counts, logits) - 1)
    return logits.masked_fill(logits < lowest, -math.inf)


def filter_top_p(logits: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    if min(top_p) == 1:
        return logits
    # Subtracted in double precision, as transformers does; below 0 where nothing is to be excluded.
    excess = column([1 - p if p < 1 else -1.0 for p in top_p], logits)
    ascending, order = logits.sort(-1)
    excluded = ascending.softmax(-1).cumsum(-1) <= excess
    excluded[:, -1] = False
    return logits.masked_fill(excluded.scatter(1, order, excluded), -math.inf)


def filter_min_p(logits: torch.Tensor, min_p: Sequence[float]) -> torch.Tensor:
    if max(min_p) == 0:
        return logits
    probabilities = logits.softmax(-1)
    lowest = column(min_p, logits) * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < lowest, -math.inf)


def column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """One value per row (rows, 1) on the device of `like`."""
    if len(set(values)) == 1:  # filling needs no copy from the host
        return torch.full((len(values), 1), values[0], device=like.device)
    return torch.tensor(values, device=like.device)[:, None]
