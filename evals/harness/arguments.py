"""The settings of an evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from evals.harness.published import BITS_PER_BYTE, CORE, parse_tasks
from modeling_nanochat.chat.sampling import check_setting
from modeling_nanochat.errors import UserError

ALL = -1  # examples per CORE task


@dataclass
class EvaluateArguments:
    """The model, the evaluation data and the output files."""

    model_name_or_path: str = field(metadata={"help": "Model folder or Hub id."})
    output_file: str = field(metadata={"help": "JSON file for the records and sample conversations."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Published tasks by name, others as name=source: a file, folder or Hub id."},
    )
    text_files: list[str] = field(
        default_factory=list, metadata={"help": "Parquet, JSONL or text files; bits per byte is over all of them."}
    )
    core_max_per_task: int | None = field(
        default=None, metadata={"help": "Examples per CORE task; max_examples if unset, -1: all."}
    )
    base_model: bool = field(
        default=False, metadata={"help": "The model was not trained on chat tokens: only bits per byte, CORE, cloze."}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Examples per task, sampled with seed; all if unset."}
    )
    max_text_tokens: int = field(default=200_000, metadata={"help": "Tokens of text for bits per byte."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per row of text for bits per byte; the model's context if unset."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts per forward pass."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens per reply, tool results included."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy decoding."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k most likely tokens; all if unset."})
    samples_per_question: int = field(default=1, metadata={"help": "Sampled replies per question, for pass@k."})
    grading: Literal["number", "original"] = field(
        default="number",
        metadata={"help": "How answers after #### are compared: as numbers, or by the original's rule, as strings."},
    )
    num_samples: int = field(default=6, metadata={"help": "Sample conversations to keep, over all tasks."})
    output_predictions: str | None = field(
        default=None, metadata={"help": "JSONL file for all predictions (task, index, right, reply); none if unset."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for sampling examples and replies."})
    verbose: bool = field(
        default=False, metadata={"help": "Print a table with standard errors and counts; show all progress bars."}
    )

    @property
    def core_limit(self) -> int | None:
        """Examples per CORE task; None: all."""
        limit = self.core_max_per_task or self.max_examples
        return None if limit == ALL else limit

    def check(self) -> None:
        """Raise `UserError` on a setting that is invalid or would have no effect."""
        sources = parse_tasks(self.tasks)
        if not sources and not self.text_files:
            raise UserError("nothing to evaluate; give tasks or text_files")
        for name in ("max_examples", "max_text_tokens", "max_length", "batch_size"):
            self.check_least(name, 1)
        if self.core_max_per_task != ALL:
            self.check_least("core_max_per_task", 1)
        for name, least in (("max_new_tokens", 1), ("samples_per_question", 1), ("num_samples", 0)):
            self.check_least(name, least)
        for name in ("temperature", "top_k", "seed"):
            check_setting(name, getattr(self, name))
        asks = any(name not in (CORE, BITS_PER_BYTE) for name in sources)
        needs = {
            "core_max_per_task": (CORE in sources, "the task core"),
            "max_length": (self.text_files or BITS_PER_BYTE in sources, "text_files"),
            "output_predictions": (asks or CORE in sources, "tasks"),
            "top_k": (self.temperature, "temperature"),
        }
        for name, (has_effect, needed) in needs.items():
            if getattr(self, name) is not None and not has_effect:
                raise UserError(f"{name} has no effect without {needed}; set {needed} or remove {name}")
        if self.samples_per_question > 1 and not self.temperature:
            raise UserError("samples_per_question above 1 needs a temperature: greedy replies are all the same")

    def check_least(self, name: str, least: int) -> None:
        if (value := getattr(self, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
