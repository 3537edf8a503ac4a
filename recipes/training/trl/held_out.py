"""pass@k on held-out problems during GRPO, sampled as the training's completions are."""

import json
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from evals.metrics.code_pass.estimate import pass_at_k
from modeling_nanochat.errors import UserError

from .rewards import is_right
from .rollouts import EngineRollouts


class HeldOutEvaluation(EngineRollouts):
    """Trainer mixin: before the first step, every `eval_steps` steps and after the last, pass@k is logged.

    Its random states are its own: a run with it trains the same model as one without.
    """

    held_out: Dataset | None = None

    def evaluate_on(self, problems: Dataset, samples: int) -> None:
        """Evaluate on `problems`, of columns `prompt` and `problem`, with `samples` completions each."""
        if self.misfit:
            raise UserError(f"leave eval_files out: the chat engine cannot decode this model ({self.misfit})")
        self.held_out, self.samples = problems, samples
        self.add_callback(EvaluationSteps(self))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """pass@k for k = 1..samples and `pass@k_standard_error`, over the problems of all processes."""
        assert self.held_out is not None, "`evaluate_on` was called"
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = self.held_out.select(range(rank, len(self.held_out), world))
        rendered = [self.engine.codec.prompt(prompt) for prompt in own["prompt"] for _ in range(self.samples)]
        self.model.eval()  # also makes TRL log these figures apart from the training's
        turns = self.sample(rendered, self.args.seed + rank, self.args.generation_batch_size // world)
        records = [json.loads(problem) for problem in own["problem"] for _ in range(self.samples)]
        right = [is_right(turn.messages, record) for turn, record in zip(turns, records, strict=True)]
        grades = gather_object([right[i : i + self.samples] for i in range(0, len(right), self.samples)])
        figures = {}
        for k in range(1, self.samples + 1):
            figures[f"eval_pass@{k}"], figures[f"eval_pass@{k}_standard_error"] = pass_at_k(grades, k)
        self.log(dict(figures))
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


class EvaluationSteps(TrainerCallback):
    """Evaluates between the log and the checkpoint of a step, as the trainer's own strategies do."""

    def __init__(self, trainer: HeldOutEvaluation):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step, last = state.global_step, state.max_steps
        control.should_evaluate = step == last or bool(args.eval_steps and step % args.eval_steps == 0)
