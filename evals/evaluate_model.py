"""Evaluate a model folder or Hub id on task files and bits per byte of text; write records and sample replies.

    python evals/evaluate_model.py --model_name_or_path runs/pocket/sft --output_file runs/pocket/results/sft.json \
        --eval_files facts=runs/pocket/data/eval/facts.jsonl problems=runs/pocket/data/eval/problems.jsonl \
        --text_files runs/pocket/data/pretrain/val.parquet
    python evals/evaluate_model.py --config recipes/pocket/eval.yaml --max_examples 50
    python evals/evaluate_model.py --model_name_or_path me/my-base --base_model true --core_dir data/core \
        --output_file core.json

A task file has GSM8K, match, ARC, MMLU or cloze records; their fields tell the task, see `evals/tasks/table.py`. It is
JSONL, JSON or parquet, a folder as the Hub has it, or a Hub id: `arc=allenai/ai2_arc:ARC-Easy:test`.
`--core_dir` adds the CORE metric: one record for CORE, and one for each of its tasks.
`--base_model true` is for a model not trained on chat tokens: only bits per byte, CORE and cloze tasks are run, the
other tasks have no records, and the report shows "-" for them.
`--output_predictions` saves every reply and whether it is right, for comparing two models question by question.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from evals.bits_per_byte import text_bits_per_byte
from evals.core.score import CoreTask, core, load_core
from evals.progress import EvaluationProgress
from evals.reporting.records import format_count, format_value, make_record, summary_line
from evals.tasks.evaluation import evaluate_task
from evals.tasks.question import EvaluatedModel
from evals.tasks.replies import ReplyQuestion, generate_replies
from evals.tasks.task_files import NamedTask, load_task, parse_task_argument
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions, check_setting
from modeling_nanochat.cli import is_verbose, parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import write_json, write_jsonl
from modeling_nanochat.loading import load_model_and_tokenizer

GREETING = "Who are you?"
NEEDS = {
    "core_max_per_task": "core_dir",
    "max_examples": "eval_files",
    "max_length": "text_files",
    "output_predictions": "eval_files",
    "top_k": "temperature",
}


@dataclass
class EvaluateArguments:
    """The model, the evaluation data and the output files."""

    model_name_or_path: str = field(metadata={"help": "Model folder or Hub id."})
    output_file: str = field(metadata={"help": "JSON file for the records and sample conversations."})
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "Tasks, each as name=source: a file, folder or Hub id."}
    )
    text_files: list[str] = field(
        default_factory=list, metadata={"help": "Parquet, JSONL or text files; bits per byte is over all of them."}
    )
    core_dir: str | None = field(
        default=None, metadata={"help": "Folder with the CORE tasks (core.json or core.yaml); no CORE if unset."}
    )
    core_max_per_task: int | None = field(default=None, metadata={"help": "Examples per CORE task; all if unset."})
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
    num_samples: int = field(default=6, metadata={"help": "Sample conversations to keep, over all tasks."})
    output_predictions: str | None = field(
        default=None, metadata={"help": "JSONL file for all predictions (task, index, right, reply); none if unset."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for sampling examples and replies."})
    verbose: bool = field(
        default=False, metadata={"help": "Print a table with standard errors and counts; show all progress bars."}
    )

    def check(self) -> None:
        """Raise `UserError` on a setting that is invalid or would have no effect."""
        if not self.eval_files and not self.text_files and not self.core_dir:
            raise UserError("nothing to evaluate; give eval_files, text_files or core_dir")
        counts = ("max_examples", "core_max_per_task", "max_text_tokens", "max_length", "batch_size", "max_new_tokens")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.num_samples < 0:
            raise UserError(f"num_samples is {self.num_samples}; it must be at least 0")
        for name in ("temperature", "top_k", "seed"):
            check_setting(name, getattr(self, name))
        for name, needed in NEEDS.items():
            if getattr(self, name) is not None and not getattr(self, needed):
                raise UserError(f"{name} has no effect without {needed}; set {needed} or remove {name}")


def main() -> None:
    (args,) = parse(EvaluateArguments)
    verbose = args.verbose or is_verbose()
    if not verbose:
        hide_library_bars()
    results = run_evaluation(args)
    if verbose:
        rows = [[r["task"], r["metric"], format_value(r), format_count(r)] for r in results["records"]]
        print(f"{args.model_name_or_path}, {results['seconds']:.0f} s, results in {args.output_file}")
        print(text_table([["task", "metric", "value ± standard error", "n"], *rows]))
    else:
        print(summary_line(results["records"]))
    for record in results["records"]:
        if "note" in record:
            print(f"{record['task']}: {record['note']}")


def hide_library_bars() -> None:
    """Disable the progress bars of datasets and transformers, which take a moment and stay on the screen."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


@without_cudnn_attention()
def run_evaluation(args: EvaluateArguments) -> dict[str, Any]:
    """Write {"model", "seconds", "records", "samples"} to `args.output_file`, and return it.

    `args.output_predictions` is written first.

    Raises:
        UserError: A setting, a file or the model folder is invalid; nothing is written.
    """
    args.check()
    started = time.perf_counter()
    tasks = load_tasks(args)
    core_tasks = load_core(args.core_dir) if args.core_dir else []
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path)
    records = [text_record(model, tokenizer, args)] if args.text_files else []
    asked = evaluated_model(model, tokenizer, args)
    drawn = {"max_examples": args.max_examples, "seed": args.seed}
    with EvaluationProgress(sum(question.prompts for task in tasks for question in task.questions)) as progress:
        results = []
        for task in tasks:
            progress.start(task.name)
            results.append(evaluate_task(task, asked, args.model_name_or_path, drawn, progress.update))
    samples = spread([result.samples for result in results if result.samples], args.num_samples)
    if asked.engine is not None:
        samples.append(greeting(asked))
    records += [record for result in results for record in result.records]
    if core_tasks:
        records += core_records(model, tokenizer, core_tasks, args)
    seconds = round(time.perf_counter() - started, 1)
    evaluation = {"model": args.model_name_or_path, "seconds": seconds, "records": records, "samples": samples}
    if args.output_predictions:
        write_jsonl(args.output_predictions, (row for result in results for row in result.predictions))
    write_json(args.output_file, evaluation)
    return evaluation


def evaluated_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, args: EvaluateArguments
) -> EvaluatedModel:
    engine = None if args.base_model else Engine(model, tokenizer)
    # Without the model folder's own options, so that results of different models are comparable.
    options = SamplingOptions(temperature=args.temperature, top_k=args.top_k)
    return EvaluatedModel(model, tokenizer, engine, options, args.batch_size, args.max_new_tokens, args.seed)


def load_tasks(args: EvaluateArguments) -> list[NamedTask]:
    """Return the tasks of `args.eval_files` that this model can be evaluated on, those answered in words first.

    Raises:
        UserError: A file is invalid, or nothing is left to evaluate.
    """
    named = [parse_task_argument(argument) for argument in args.eval_files]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise UserError(f"eval_files: a task name occurs twice in {', '.join(names)}; give each file its own name")
    tasks = [load_task(name, source, args.max_examples, args.seed) for name, source in named]
    runnable = [task for task in tasks if not (task.task.needs_chat and args.base_model)]
    if not runnable and not args.text_files and not args.core_dir:
        raise UserError(
            f"nothing to evaluate: {', '.join(names)} need chat tokens, which a base_model was not trained on; give "
            "cloze tasks, text_files or core_dir, or remove base_model"
        )
    return sorted(runnable, key=lambda task: not issubclass(task.task, ReplyQuestion))


def text_record(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, args: EvaluateArguments) -> dict[str, Any]:
    max_length = args.max_length or model.config.max_position_embeddings
    # Text rows are longer than prompts: keep the tokens per batch similar, at 64 tokens per prompt.
    batch_size = max(1, args.batch_size * 64 // max_length)
    figures = text_bits_per_byte(
        model,
        tokenizer,
        args.text_files,
        max_length=max_length,
        batch_size=batch_size,
        max_tokens=args.max_text_tokens,
    )
    settings = {
        "files": args.text_files,
        "max_length": max_length,
        "tokens": figures["tokens"],
        "rows": figures["rows"],
    }
    value, error, n = figures["bits_per_byte"], figures["standard_error"], figures["bytes"]
    return make_record("text", "bits_per_byte", value, error, n, settings, args.model_name_or_path)


def core_records(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[CoreTask], args: EvaluateArguments
) -> list[dict[str, Any]]:
    """Return records of CORE, and of the accuracy on each of its tasks, named `core_<label>`."""
    result = core(model, tokenizer, tasks, max_per_task=args.core_max_per_task or -1, batch_size=args.batch_size)
    shared = {"max_per_task": args.core_max_per_task, "max_length": model.config.max_position_embeddings}
    total, model_name = sum(int(figures["n"]) for figures in result.tasks.values()), args.model_name_or_path
    settings, value, error = {"tasks": len(tasks)} | shared, result.core, result.standard_error
    records = [make_record("core", "centered_accuracy", value, error, total, settings, model_name)]
    for task in tasks:
        settings = {"shots": task.num_fewshot, "baseline": round(task.baseline, 4)} | shared
        figures = result.tasks[task.label]
        value, error, n = figures["accuracy"], figures["standard_error"], int(figures["n"])
        records.append(make_record(f"core_{task.label}", "accuracy", value, error, n, settings, model_name))
    return records


def spread(samples: Sequence[Sequence[dict]], count: int) -> list[dict]:
    """Return the first conversations of each task, right or wrong, at most `count` in total."""
    per_task, extra = divmod(max(0, count), max(1, len(samples)))
    return [sample for i, of_task in enumerate(samples) for sample in of_task[: per_task + (i < extra)]]


def greeting(asked: EvaluatedModel) -> dict[str, Any]:
    messages = [{"role": "user", "content": GREETING}]
    (reply,) = generate_replies(asked, [messages])
    return {"messages": [*messages, *reply]}


if __name__ == "__main__":
    exit_on_user_error(main)
