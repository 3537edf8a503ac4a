"""pass@k on held-out problems during GRPO, sampled as the training's completions are."""

import json

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel

from evals.metrics.code_pass.estimate import pass_at_k
from modeling_nanochat.errors import UserError

from ..evaluation import Evaluation
from .evaluations import Evaluating, with_error
from .rewards import is_right
from .rollouts import EngineRollouts


class HeldOutEvaluation(Evaluating, EngineRollouts):
    """Trainer mixin: before the first step, every `eval_steps` steps and after the last, pass@k is logged."""

    def evaluate_on(self, problems: Dataset, samples: int) -> None:
        """Evaluate on `problems`, of columns `prompt` and `problem`, with `samples` completions each."""
        if self.misfit:
            raise UserError(f"leave eval_files out: the chat engine cannot decode this model ({self.misfit})")

        def run(model: PreTrainedModel) -> tuple[dict[str, object], list[str]]:
            grades = self.grades(problems, samples)
            figures: dict[str, object] = {}
            for k in range(1, samples + 1):
                figures[f"pass@{k}"], figures[f"pass@{k}_standard_error"] = pass_at_k(grades, k)
            ends = [with_error(f"pass@{k}", figures) for k in sorted({1, samples})]
            return figures, [f"{', '.join(ends)} on held-out problems"]

        self.evaluate_by(Evaluation(int(self.args.eval_steps or 0), run, at_start=True))

    def grades(self, problems: Dataset, samples: int) -> list[list[bool]]:
        """Whether each of the `samples` completions of each problem is right, over the problems of all processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = problems.select(range(rank, len(problems), world))
        rendered = [self.engine.codec.prompt(prompt) for prompt in own["prompt"] for _ in range(samples)]
        turns = self.sample(rendered, self.args.seed + rank, self.args.generation_batch_size // world)
        records = [json.loads(problem) for problem in own["problem"] for _ in range(samples)]
        right = [is_right(turn.messages, record) for turn, record in zip(turns, records, strict=True)]
        return gather_object([right[i : i + samples] for i in range(0, len(right), samples)])
