"""Signs that a stage learns nothing: reported in its output, its record and the report card; training continues."""

from copy import copy
from typing import Any

STREAK = 10  # steps in a row after which a sign is reported; in a shorter run, all of its steps
STATE = ("step", "losses", "held_out", "since", "longest")  # of a LearningWatch, plain values
FEWEST_STEPS = 10  # for judging the loss: in shorter runs a fifth of the steps would be a single batch
# measurement -> the value that is a sign, its meaning, advice
SIGNS = {
    "grad_norm": (0.0, "all gradients were zero", "look for data without tokens to train on"),
    "reward_std": (
        0.0,
        "no group of completions differed in reward",
        "without a difference there is no gradient: give problems that are solved sometimes, or raise num_generations",
    ),
    "clipped_ratio": (
        1.0,
        "no completion ended by itself",
        "raise max_completion_length, or start from a model that ends its replies",
    ),
}


class LearningWatch:
    """Watches the measurements of a stage, step by step; compares plain numbers, no tensors.

    Args:
        stage: base, mid, sft or rl; the loss of rl is not judged, because it does not measure learning.
        max_steps: Optimizer steps of the run.
    """

    def __init__(self, stage: str, max_steps: int):
        self.stage, self.max_steps = stage, max_steps
        self.fifth = max_steps // 5
        self.step = 0  # the last observed step
        self.losses = {"first": [0.0, 0], "last": [0.0, 0]}  # sum and count over that fifth of the steps
        self.held_out: list[tuple[int, float]] = []  # first and newest step and loss on held-out data
        self.since: dict[str, int] = {}  # sign -> first step of the current streak
        self.longest: dict[str, list[int]] = {}  # sign -> first and last step of the longest streak

    def observe(
        self,
        step: int,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        reward_std: float | None = None,
        clipped_ratio: float | None = None,
    ) -> list[str]:
        """Record the measurements of `step`, counted from 1; None means not measured, and does not end a streak.

        Args:
            loss: Mean loss of the step.
            grad_norm: Norm of all gradients, or any number that is 0 only if all of them are.
            reward_std: 0 if no group of completions differed in reward.
            clipped_ratio: Share of completions truncated at the maximum length.

        Returns:
            New warnings, one line each.
        """
        before, self.step = set(self.lasting_signs()), step
        values = {"grad_norm": grad_norm, "reward_std": reward_std, "clipped_ratio": clipped_ratio}
        for sign, value in values.items():
            if value is not None:
                self.note(sign, step, holds=value == SIGNS[sign][0])
        if loss is not None:
            for fifth, inside in (("first", step <= self.fifth), ("last", step > self.max_steps - self.fifth)):
                if inside:
                    self.losses[fifth] = [self.losses[fifth][0] + loss, self.losses[fifth][1] + 1]
        found = [text for sign, text in self.lasting_signs().items() if sign not in before]
        return found + self.loss_warnings()

    def observe_held_out(self, step: int, loss: float) -> list[str]:
        """Record the loss on held-out data after `step`. Where it is measured, training's is not judged.

        Returns:
            New warnings, one line each.
        """
        self.held_out = [*self.held_out[:1], (step, loss)]
        return self.loss_warnings()

    @property
    def warnings(self) -> list[str]:
        """All warnings so far, for the stage's record; each sign with the steps of its longest streak."""
        return [*self.lasting_signs().values(), *self.loss_warnings()]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, so that a resumed run judges all its steps."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, copy(state[name]))

    def note(self, sign: str, step: int, holds: bool) -> None:
        if not holds:
            self.since.pop(sign, None)
            return
        first = self.since.setdefault(sign, step)
        longest = self.longest.get(sign)
        if longest is None or step - first > longest[1] - longest[0]:
            self.longest[sign] = [first, step]

    def lasting_signs(self) -> dict[str, str]:
        """Sign -> warning, for the signs that lasted long enough."""
        found = {}
        for sign, (first, last) in self.longest.items():
            if last - first + 1 >= min(STREAK, self.max_steps):
                _, meaning, advice = SIGNS[sign]
                found[sign] = f"{meaning} from step {first} to step {last}; {advice}"
        return found

    def loss_warnings(self) -> list[str]:
        if self.stage == "rl" or not self.step == self.max_steps >= FEWEST_STEPS:
            return []
        if self.held_out:
            (began, first), (ended, last) = self.held_out[0], self.held_out[-1]
            known = began < ended == self.max_steps
            found = f"on held-out data did not fall: {first:.4g} after step {began}, {last:.4g} after step {ended}"
        else:
            (first, first_count), (last, last_count) = self.losses["first"], self.losses["last"]
            first, last = first / max(first_count, 1), last / max(last_count, 1)
            known = first_count > 0 and last_count > 0
            found = (
                f"did not fall: {first:.4g} over the first {self.fifth} steps, {last:.4g} over the last {self.fifth}"
            )
        return [f"the loss {found}; check the learning rates and the training data"] if known and last >= first else []
