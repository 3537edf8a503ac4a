"""Evaluate a model, a folder or Hub id, on published tasks, on one's own and on text; write records and replies.

    accelerate launch --quiet evals/evaluate_model.py --model_name_or_path runs/d20/sft --output_file sft.json \
        --tasks arc_easy arc_challenge mmlu gsm8k humaneval spelling_bee --max_new_tokens 512 --batch_size 128
    python evals/evaluate_model.py --model_name_or_path openai-community/gpt2 --base_model true \
        --tasks core bits_per_byte --output_file gpt2.json
    python evals/evaluate_model.py --config recipes/pocket/eval.yaml --max_examples 50

A task is the name of a published one (`evals/harness/published.py`) or `name=source`: a JSONL, JSON or parquet file, a
folder as the Hub has it, or a Hub id such as `arc=allenai/ai2_arc:ARC-Easy:test`. The fields of its records tell their
kind, see `evals/tasks/table.py`. `core` gives one record for the CORE metric and one for each of its tasks;
`core=FOLDER` reads them from a folder, else they are downloaded once. Bits per byte are those of `--text_files`, or
with the task `bits_per_byte` of the original's validation text.

Several processes share the questions, with the same results as one. After each task its results are kept in
`<output_file>.partial`: the same command goes on after the last finished task, and removes the file at its end.
`--base_model true` is for a model not trained on chat tokens: only bits per byte, CORE and cloze tasks are run, the
other tasks have no records, and the report shows "-" for them.
`--output_predictions` saves every reply and whether it is right, for `evals/compare.py`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from evals.core.bundle import core_folder
from evals.core.score import CoreTask, load_core
from evals.harness.arguments import EvaluateArguments
from evals.harness.asking import chat_engine, check_chat_template, greeting
from evals.harness.measurements import chat_core_records, core_record, core_task_result, text_result, validation_text
from evals.harness.partial_results import PartialResults, check_writable, fingerprint, hash_of
from evals.harness.processes import ALONE, Processes, launched_processes
from evals.harness.progress import EvaluationProgress
from evals.harness.published import BITS_PER_BYTE, CORE, parse_tasks
from evals.reporting.records import format_count, format_value, summary_line
from evals.tasks.evaluation import TaskResult, evaluate_task, own_prompts
from evals.tasks.question import EvaluatedModel
from evals.tasks.replies import ReplyQuestion
from evals.tasks.task_files import NamedTask, load_task
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.cli import is_verbose, parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import write_json, write_jsonl
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.text.sources import expand

OUTPUTS = ("output_file", "output_predictions", "verbose")  # settings that results do not depend on


def main() -> None:
    with launched_processes("the same command goes on after the last finished task") as processes:
        (args,) = parse(EvaluateArguments)
        verbose = args.verbose or is_verbose()
        if not verbose or not processes.is_first:
            hide_library_bars()
        results = run_evaluation(args, processes)
    if processes.is_first:
        show(results, args, verbose)


def show(results: dict[str, Any], args: EvaluateArguments, verbose: bool) -> None:
    """Print the figures, in a line or a table, and the notes."""
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
def run_evaluation(args: EvaluateArguments, processes: Processes = ALONE) -> dict[str, Any]:
    """Write {"model", "seconds", "records", "samples"} to `args.output_file`, and return it.

    `args.output_predictions` is written first. All processes call this; the first one writes.

    Raises:
        UserError: A setting, a file or the model folder is invalid; reported before the model is asked anything.
    """
    started = time.perf_counter()
    args.check()
    for name in ("output_file", "output_predictions"):
        if processes.is_first and getattr(args, name):
            check_writable(getattr(args, name), name)
    tasks, core_tasks, texts = load_tasks(args), load_core_tasks(args), text_files(args)
    for task in tasks:
        task.task.check_grading()
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, device=processes.device)
    asked = evaluated_model(model, tokenizer, tasks, args)
    results = PartialResults(args.output_file, evaluation_key(args, model, tasks, texts), started, processes)
    if texts:
        results.run({BITS_PER_BYTE: partial(text_result, asked, texts, args, processes)})
    with progress_of(tasks, results, asked, processes) as progress:
        results.run({task.name: partial(ask, task, asked, args, progress, processes) for task in tasks})
    results.run({core_part(task): partial(core_task_result, asked, task, args, processes) for task in core_tasks})
    if not processes.is_first:
        return {}
    parts = [*([BITS_PER_BYTE] if texts else []), *(task.name for task in tasks)]
    parts += [core_part(task) for task in core_tasks]
    return write_results(args, results, [results.finished[part] for part in parts], core_tasks, asked)


def load_tasks(args: EvaluateArguments) -> list[NamedTask]:
    """Return the tasks of questions that this model can be evaluated on, those answered in words first.

    Raises:
        UserError: A file is invalid, or nothing is left to evaluate.
    """
    sources = parse_tasks(args.tasks)
    names = [name for name in sources if name not in (CORE, BITS_PER_BYTE)]
    drawn = (args.max_examples, args.seed, args.grading)
    tasks = [load_task(name, sources[name], *drawn) for name in names]
    runnable = [task for task in tasks if not (task.task.needs_chat and args.base_model)]
    if names and not runnable and len(names) == len(sources) and not args.text_files:
        raise UserError(
            f"nothing to evaluate: {', '.join(names)} need chat tokens, which a base_model was not trained on; give "
            "cloze tasks, text_files or the task core, or remove base_model"
        )
    return sorted(runnable, key=lambda task: not issubclass(task.task, ReplyQuestion))


def load_core_tasks(args: EvaluateArguments) -> list[CoreTask]:
    sources = parse_tasks(args.tasks)
    return load_core(core_folder(sources[CORE])) if CORE in sources else []


def text_files(args: EvaluateArguments) -> list[str]:
    """Return the files and Hub ids of the text for bits per byte."""
    if BITS_PER_BYTE in parse_tasks(args.tasks) and not args.text_files:
        return [validation_text()]
    return expand(args.text_files, "text_files") if args.text_files else []


def evaluated_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[NamedTask], args: EvaluateArguments
) -> EvaluatedModel:
    check_chat_template(tokenizer, tasks, args.model_name_or_path)
    # Without the model folder's own options, so that results of different models are comparable.
    options = SamplingOptions(temperature=args.temperature, top_k=args.top_k)
    engine, samples = chat_engine(model, tokenizer, tasks), args.samples_per_question
    return EvaluatedModel(model, tokenizer, engine, options, args.batch_size, args.max_new_tokens, args.seed, samples)


def evaluation_key(
    args: EvaluateArguments, model: PreTrainedModel, tasks: Sequence[NamedTask], texts: Sequence[str]
) -> str:
    """Return a hash of what the results depend on: settings, model and data."""
    settings = {name: value for name, value in asdict(args).items() if name not in OUTPUTS}
    sources = parse_tasks(args.tasks)
    files = [*texts, *([str(core_folder(sources[CORE]))] if CORE in sources else [])]
    questions = [[task.name, hash_of(task.questions)] for task in tasks]
    weights = fingerprint(str(model.name_or_path))
    return hash_of([settings, weights, str(model.dtype), [fingerprint(file) for file in files], questions])


def core_part(task: CoreTask) -> str:
    return f"{CORE}={task.label}"  # no task of questions has a "=" in its name


def progress_of(
    tasks: Sequence[NamedTask], results: PartialResults, asked: EvaluatedModel, processes: Processes
) -> EvaluationProgress:
    waiting = [task for task in tasks if task.name not in results.finished]
    return EvaluationProgress(sum(own_prompts(task, asked, processes) for task in waiting), not processes.is_first)


def ask(
    task: NamedTask, asked: EvaluatedModel, args: EvaluateArguments, progress: EvaluationProgress, processes: Processes
) -> TaskResult:
    progress.start(task.name)
    drawn = {"max_examples": args.max_examples, "seed": args.seed}
    result = evaluate_task(task, asked, args.model_name_or_path, drawn, progress.update, processes)
    return replace(result, samples=result.samples[: args.num_samples])


def write_results(
    args: EvaluateArguments,
    results: PartialResults,
    parts: Sequence[TaskResult],
    core_tasks: Sequence[CoreTask],
    asked: EvaluatedModel,
) -> dict[str, Any]:
    """Write and return the evaluation of all `parts`; their partial results are removed."""
    records = [record for part in parts for record in part.records]
    if core_tasks:
        of_core = records[len(records) - len(core_tasks) :]
        records[len(records) - len(core_tasks) :] = [core_record(core_tasks, of_core, args), *of_core]
    records += chat_core_records(records, args.model_name_or_path)
    samples = spread([part.samples for part in parts if part.samples], args.num_samples)
    if asked.engine is not None:
        samples.append(greeting(asked))
    evaluation = {"model": args.model_name_or_path, "seconds": results.seconds, "records": records, "samples": samples}
    if args.output_predictions:
        write_jsonl(args.output_predictions, (row for part in parts for row in part.predictions))
    write_json(args.output_file, evaluation)
    results.remove()
    return evaluation


def spread(samples: Sequence[Sequence[dict]], count: int) -> list[dict]:
    """Return the first conversations of each task, right or wrong, at most `count` in total."""
    per_task, extra = divmod(max(0, count), max(1, len(samples)))
    return [sample for i, of_task in enumerate(samples) for sample in of_task[: per_task + (i < extra)]]


if __name__ == "__main__":
    exit_on_user_error(main)
