"""SFT's evaluations: the loss on held-out conversations, and the accuracy on tasks with ChatCORE.

Both are the same for any number of processes, which share batches and questions.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from evals.harness.asking import chat_engine, check_chat_template
from evals.harness.measurements import chat_core_records
from evals.harness.processes import Processes
from evals.harness.published import BITS_PER_BYTE, CORE, parse_tasks
from evals.tasks.evaluation import evaluate_task
from evals.tasks.question import EvaluatedModel
from evals.tasks.task_files import NamedTask, load_task
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.errors import UserError

from ..evaluation import Evaluation
from .evaluations import Evaluating, with_error


@dataclass(kw_only=True)
class TaskArguments:
    """The tasks of an SFT model's evaluations, in the words of `evals/evaluate_model.py`."""

    eval_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Published tasks by name, others as name=source; with the six of ChatCORE also that."},
    )
    eval_tasks_steps: int = field(default=200, metadata={"help": "Steps between evaluations on eval_tasks."})
    max_examples: int = field(default=256, metadata={"help": "Questions of each of eval_tasks, sampled with seed."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens per reply, tool results included."})

    def load_tasks(self, seed: int, skipped: Container[str] = ()) -> list[NamedTask]:
        """The questions, except those from sources in `skipped`, which do not exist yet.

        Raises:
            UserError: A task is unknown, its source is missing or malformed, or its answers cannot be graded here.
        """
        sources = parse_tasks(self.eval_tasks)
        if other := sources.keys() & {CORE, BITS_PER_BYTE}:
            raise UserError(f"eval_tasks: {min(other)} is no task of questions; measure it by evals/evaluate_model.py")
        wanted = {name: source for name, source in sources.items() if source is None or source not in skipped}
        tasks = [load_task(name, source, self.max_examples, seed) for name, source in wanted.items()]
        for task in tasks:
            task.task.check_grading()
        return tasks


class SFTEvaluation(Evaluating, SFTTrainer):
    """Trainer mixin: the evaluations of SFT."""

    args: SFTConfig
    model: PreTrainedModel

    def evaluate_on(self, tasks: Sequence[NamedTask], arguments: TaskArguments) -> None:
        """Evaluate on `eval_dataset` every `eval_steps` steps and at the start, on `tasks` at their own interval.

        Raises:
            UserError: The model cannot be asked.
        """
        evaluations = []
        if self.eval_dataset is not None:
            evaluations.append(Evaluation(int(self.args.eval_steps or 0), self.run_loss, at_start=True))
        if tasks:
            evaluations.append(task_evaluation(self, tasks, arguments))
        if evaluations:
            self.evaluate_by(*evaluations)

    @property
    def processes(self) -> Processes:
        accelerator = self.accelerator
        return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)

    def run_loss(self, model: PreTrainedModel) -> tuple[dict[str, object], list[str]]:
        """The mean loss per trained-on token of the held-out conversations, in batches that no process changes."""
        rows: Any = self.eval_dataset
        size = self.args.per_device_eval_batch_size
        starts = self.processes.share(range(0, len(rows), size))
        batches = ([rows[i] for i in range(start, min(start + size, len(rows)))] for start in starts)
        sums = self.processes.gather([self.summed_loss(model, self.data_collator(batch)) for batch in batches])
        loss = sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)
        return {"loss": loss}, [f"loss {loss:.4f} on held-out conversations"]

    @torch.no_grad()
    def summed_loss(self, model: Any, batch: dict[str, Any]) -> tuple[float, int]:
        inputs = self._prepare_inputs({key: batch[key] for key in batch if key != "num_tokens"})
        with self.accelerator.autocast():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.double().sum().item(), int(outputs.label_mask.sum())


def task_evaluation(trainer: SFTEvaluation, tasks: Sequence[NamedTask], arguments: TaskArguments) -> Evaluation:
    """The accuracy on each task with its standard error, and `chat_core` with all six of its tasks."""
    wrapped: Any = trainer.model
    model: PreTrainedModel = wrapped.get_base_model() if is_peft_model(wrapped) else wrapped
    tokenizer: Any = trainer.processing_class
    check_chat_template(tokenizer, tasks, str(model.name_or_path))
    engine = chat_engine(model, tokenizer, tasks)
    trainer.model.train()  # an engine puts it into evaluation mode
    asked = EvaluatedModel(
        model,
        tokenizer,
        engine,
        SamplingOptions(temperature=0.0),
        trainer.args.per_device_eval_batch_size,
        arguments.max_new_tokens,
        trainer.args.seed,
    )

    def run(_: PreTrainedModel) -> tuple[dict[str, object], list[str]]:
        records = [evaluate_task(task, asked, "", {}, processes=trainer.processes).records[0] for task in tasks]
        records += chat_core_records(records, "")
        figures: dict[str, object] = {record["task"]: record["value"] for record in records}
        figures |= {f"{record['task']}_standard_error": record["standard_error"] for record in records}
        return figures, [with_error(record["task"], figures) for record in records]

    return Evaluation(arguments.eval_tasks_steps, run)
