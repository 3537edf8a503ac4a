"""Signs that a stage learns nothing. They are reported, in its output, its record and the report card, and end nothing."""

from typing import Any

STREAK = 10  # steps in a row after which a sign is reported; in a shorter run, all of its steps
FEWEST_STEPS = 10  # of a run whose loss is judged: with fewer, a fifth of the steps would be a single batch
# measurement -> the value that is a sign, what it means, what to look at
SIGNS = {
    "grad_norm": (0.0, "all gradients were zero", "look for data in which no token is trained on"),
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
    """Watches the measurements of a stage, step by step; a few comparisons of numbers, no tensors.

    Args:
        stage: base, mid, sft or rl; the loss of rl says nothing about what is learnt, and is not judged.
        max_steps: Optimizer steps of the whole run.
    """

    def __init__(self, stage: str, max_steps: int):
        self.stage, self.max_steps = stage, max_steps
        self.fifth = max_steps // 5
        self.step = 0  # the last one observed
        self.losses = {"first": [0.0, 0], "last": [0.0, 0]}  # sum and count in that fifth of the steps
        self.since: dict[str, int] = {}  # sign -> the first step of the streak that lasts
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
        """Take in what was measured in `step`, counted from 1; what was not measured is None, and breaks no streak.

        Args:
            loss: Mean loss of the step.
            grad_norm: Norm of all gradients, or any number that is 0 only where all of them are.
            reward_std: 0 where no group of completions differed in reward.
            clipped_ratio: Share of the completions that were cut at the maximum length.

        Returns:
            Warnings that are new with this step, one line each.
        """
        before, self.step = set(self.signs_of_nothing()), step
        values = {"grad_norm": grad_norm, "reward_std": reward_std, "clipped_ratio": clipped_ratio}
        for sign, value in values.items():
            if value is not None:
                self.note(sign, step, holds=value == SIGNS[sign][0])
        if loss is not None:
            for part, inside in (("first", step <= self.fifth), ("last", step > self.max_steps - self.fifth)):
                if inside:
                    self.losses[part] = [self.losses[part][0] + loss, self.losses[part][1] + 1]
        found = [text for sign, text in self.signs_of_nothing().items() if sign not in before]
        return found + self.loss_warnings()

    @property
    def warnings(self) -> list[str]:
        """All warnings so far, for the stage's record; a sign's names the steps of its longest streak."""
        return [*self.signs_of_nothing().values(), *self.loss_warnings()]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, so that a resumed run judges all of its steps."""
        return {"step": self.step, "losses": self.losses, "since": self.since, "longest": self.longest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.losses, self.since, self.longest = (dict(state[name]) for name in ("losses", "since", "longest"))

    def note(self, sign: str, step: int, holds: bool) -> None:
        if not holds:
            self.since.pop(sign, None)
            return
        first = self.since.setdefault(sign, step)
        longest = self.longest.get(sign)
        if longest is None or step - first > longest[1] - longest[0]:
            self.longest[sign] = [first, step]

    def signs_of_nothing(self) -> dict[str, str]:
        """Sign -> warning, of those that lasted long enough."""
        found = {}
        for sign, (first, last) in self.longest.items():
            if last - first + 1 >= min(STREAK, self.max_steps):
                _, meaning, advice = SIGNS[sign]
                found[sign] = f"{meaning} from step {first} to step {last}; {advice}"
        return found

    def loss_warnings(self) -> list[str]:
        (first, first_count), (last, last_count) = self.losses["first"], self.losses["last"]
        judged = self.stage != "rl" and self.step == self.max_steps >= FEWEST_STEPS
        if not (judged and first_count and last_count):
            return []
        first, last = first / first_count, last / last_count
        if last < first:
            return []
        return [
            f"the loss did not fall: {first:.4g} over the first {self.fifth} steps, {last:.4g} over the last {self.fifth}; "
            "look at the learning rates, and at whether the data is what the model should learn"
        ]
