"""What is measured of a model beside single tasks of questions: bits per byte of text, CORE and ChatCORE."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import hf_hub_download

from evals.bits_per_byte import text_bits_per_byte
from evals.core.score import CoreTask, combine, core
from evals.harness.arguments import EvaluateArguments
from evals.harness.processes import Processes
from evals.harness.published import BITS_PER_BYTE, CORE, VALIDATION_TEXT
from evals.metrics.chat_core.six_tasks import BASELINES, chat_core
from evals.reporting.records import make_record
from evals.scoring import context_of
from evals.tasks.evaluation import TaskResult, prediction_rows
from evals.tasks.question import EvaluatedModel
from modeling_nanochat.errors import UserError, one_line

TOKENS_PER_PROMPT = 64  # rows of text are longer than prompts: they are batched to about as many tokens


def validation_text() -> str:
    """Return the file of the original's validation text, downloaded once.

    Raises:
        UserError: It cannot be downloaded.
    """
    repository, file = VALIDATION_TEXT
    try:
        return hf_hub_download(repository, file, repo_type="dataset")
    except Exception as error:  # the transport's errors differ between huggingface_hub 1.x and 2.x
        raise UserError(
            f"bits_per_byte: {file} of {repository} could not be loaded from the Hub ({one_line(error)}); check the "
            "network, or give text_files"
        ) from error


def text_result(
    asked: EvaluatedModel, files: Sequence[str], args: EvaluateArguments, processes: Processes
) -> TaskResult:
    """Return bits per byte of the text in `files`."""
    max_length = args.max_length or min(context_of(asked.model), args.max_text_tokens)
    figures = text_bits_per_byte(
        asked.model,
        asked.tokenizer,
        files,
        max_length=max_length,
        batch_size=max(1, args.batch_size * TOKENS_PER_PROMPT // max_length),
        max_tokens=args.max_text_tokens,
        processes=processes,
    )
    settings = {
        "files": args.text_files or list(VALIDATION_TEXT),
        "max_length": max_length,
        "tokens": figures["tokens"],
        "rows": figures["rows"],
    }
    value, error, n = figures["bits_per_byte"], figures["standard_error"], figures["bytes"]
    record = make_record("text", BITS_PER_BYTE, value, error, n, settings, args.model_name_or_path)
    if unknown := figures["unknown"]:
        record["note"] = f"{unknown:,} tokens stand for text that the tokenizer cannot spell, so the figure is too low"
    return TaskResult([record])


def core_task_result(
    asked: EvaluatedModel, task: CoreTask, args: EvaluateArguments, processes: Processes
) -> TaskResult:
    """Return the accuracy on one of CORE's tasks, named `core_<label>`."""
    result = core(
        asked.model,
        asked.tokenizer,
        [task],
        max_per_task=args.core_limit or -1,
        batch_size=args.batch_size,
        process_index=processes.index,
        num_processes=processes.count,
        gather=processes.sum,
    )
    figures, name = result.tasks[task.label], f"{CORE}_{task.label}"
    settings: dict[str, Any] = {"shots": task.num_fewshot, "baseline": round(task.baseline, 4)}
    settings |= {"max_per_task": args.core_limit, "max_length": context_of(asked.model)}
    value, error, n = figures["accuracy"], figures["standard_error"], int(figures["n"])
    record = make_record(name, "accuracy", value, error, n, settings, args.model_name_or_path)
    if notes := result.notes.get(task.label):
        record["note"] = "; ".join(notes)
    return TaskResult([record], prediction_rows(name, [[right] for right in result.right[task.label]]))


def core_record(
    tasks: Sequence[CoreTask], records: Sequence[dict[str, Any]], args: EvaluateArguments
) -> dict[str, Any]:
    """Return the record of CORE from those of its tasks, in their order."""
    counts = [(round(record["value"] * record["n"]), record["n"]) for record in records]
    result, total = combine(tasks, counts), sum(n for _, n in counts)
    shared = {key: records[0]["settings"][key] for key in ("max_per_task", "max_length")}
    settings, value, error = {"tasks": len(tasks)} | shared, result.core, result.standard_error
    return make_record(CORE, "centered_accuracy", value, error, total, settings, args.model_name_or_path)


def chat_core_records(records: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return the record of ChatCORE; none unless all of its tasks are among `records`."""
    of_tasks = {r["task"]: r for r in records if r["metric"] == "accuracy" and r["task"] in BASELINES}
    figures = chat_core({task: (record["value"], record["standard_error"]) for task, record in of_tasks.items()})
    if figures is None:
        return []
    total, settings = sum(record["n"] for record in of_tasks.values()), {"tasks": len(of_tasks)}
    return [make_record("chat_core", "centered_accuracy", *figures, total, settings, model)]
