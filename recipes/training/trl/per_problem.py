"""The original's loss: normalised by the tokens of each problem, so that every problem of a step counts equally."""

from typing import Any

import torch
from trl import GRPOTrainer

PER_PROBLEM = "per_problem"


class PerProblemLoss(GRPOTrainer):
    """Trainer mixin with one more `loss_type`, `per_problem`.

    The loss of a problem is the sum over the tokens that the model chose in its completions, divided by their number;
    the loss of a step is the mean over the problems of all processes. TRL's `dapo` divides by the tokens of the whole
    batch instead; the mask of each token is weighted so that this yields the mean per problem.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.is_per_problem = self.loss_type == PER_PROBLEM
        self.loss_type = "dapo" if self.is_per_problem else self.loss_type

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.is_per_problem:
            chosen = batch["completion_mask"] * batch.get("tool_mask", 1)
            batch["tool_mask"] = chosen * self.weights(chosen.sum(1))[:, None]
        return batch

    def weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """The weight of each completion of this process, from its number of tokens: all / (problems * problem's).

        A problem's completions are consecutive, but may be on several processes.
        """
        of_problem = self.accelerator.gather(tokens).view(-1, self.num_generations).sum(1)
        weights = of_problem.sum() / (len(of_problem) * of_problem.clamp(min=1))
        first = self.accelerator.process_index * len(tokens)
        return weights.repeat_interleave(self.num_generations)[first : first + len(tokens)]
