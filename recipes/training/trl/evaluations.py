"""Evaluations during TRL's training, at intervals of their own; they leave the training's random states alone."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..attention import evaluation_attention
from ..evaluation import Evaluation


class Evaluating(Trainer):
    """Trainer mixin: runs [`Evaluation`]s where they are due, and logs and prints what they return."""

    model: PreTrainedModel
    evaluations: Sequence[Evaluation] = ()

    def evaluate_by(self, *evaluations: Evaluation) -> None:
        self.evaluations = evaluations
        self.add_callback(EvaluationSteps(self))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of the evaluations that are due at this step, named `eval_...`."""
        started, step = time.perf_counter(), self.state.global_step
        figures, lines = dict[str, Any](), list[str]()
        self.model.eval()  # also makes TRL log these figures apart from the training's
        with evaluation_attention(self.model):
            for evaluation in self.due(step):
                values, told = evaluation.run(self.model)
                figures |= {f"eval_{name}": value for name, value in values.items()}
                lines += told
        figures["eval_runtime"] = time.perf_counter() - started
        self.log(dict(figures))
        self.model.train()
        if self.is_world_process_zero():
            tqdm.write(f"step {step:,}: {', '.join(lines)}")  # above the bar
            sys.stdout.flush()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def due(self, step: int) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if evaluation.due(step, self.state.max_steps)]


class EvaluationSteps(TrainerCallback):
    """Evaluates before the first step, and between the log and the checkpoint of others, as trainers do."""

    def __init__(self, trainer: Evaluating):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0 and self.trainer.due(0):
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_evaluate = bool(self.trainer.due(state.global_step))


def with_error(name: str, figures: Mapping[str, Any]) -> str:
    """`pass@1 0.333 ± 0.157`."""
    return f"{name} {figures[name]:.3f} ± {figures[f'{name}_standard_error']:.3f}"
