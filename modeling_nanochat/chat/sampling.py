"""Token sampling, and the range of each setting, which the commands, the page and Python share."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from ..errors import UserError

# name: (lowest, highest, integers only, None allowed)
SETTINGS = {
    "temperature": (0, 2, False, False),
    "top_k": (0, math.inf, True, True),
    "max_new_tokens": (1, math.inf, True, False),
    "seed": (0, 2**63 - 1, True, True),
}
GREEDY_BELOW = 1e-5  # only one token is likely there, and smaller divisors make logits infinite


def check_setting(name: str, value: object) -> None:
    """Raise [`UserError`] unless `value` has the setting's type and is within its range."""
    lowest, highest, is_integer, optional = SETTINGS[name]
    if value is None and optional:
        return
    kind = Integral if is_integer else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value <= highest:  # NaN fails too
        raise UserError(f"{name} must be {describe(name)}, not {value!r:.60}")


def describe(name: str) -> str:
    lowest, highest, is_integer, _ = SETTINGS[name]
    number = "a whole number" if is_integer else "a number"
    return f"{number} of at least {lowest}" if highest == math.inf else f"{number} from {lowest} to {highest}"


@dataclass(frozen=True)
class Sampler:
    """Chooses one token per row, each row independently: `temperature` 0 is argmax, `top_k` 0 or None is off."""

    temperature: float
    top_k: int | None
    generator: torch.Generator

    def __post_init__(self):
        check_setting("temperature", self.temperature)
        check_setting("top_k", self.top_k)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) -> token ids (rows,)."""
        if self.temperature < GREEDY_BELOW:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if not self.top_k:
            return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)
        values, ids = logits.topk(min(self.top_k, logits.shape[-1]))
        choice = torch.multinomial(values.softmax(-1), 1, generator=self.generator)
        return ids.gather(1, choice).squeeze(1)
