"""Load the tasks of the CORE metric from a folder: examples, prompt settings, and the accuracy of guessing.

Two layouts are supported. `core.json`: {"tasks": [{"label", "dataset", "icl_task_type", "num_fewshot",
"continuation_delimiter" (a space if left out), "random_baseline_percent"}, ...]}, each dataset a JSONL file, relative
to the folder. `core.yaml`: DCLM's unpacked evaluation bundle, with the files in `eval_data/` and the baselines in
`eval_meta_data.csv`.

Fields of a line in a task file, by the type of the task:
multiple_choice     {"query", "choices", "gold"}
schema              {"context_options", "continuation", "gold"}
language_modeling   {"context", "continuation"}
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evals.tasks.fields import is_list_of_strings, require_index, require_strings
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_jsonl

MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = "multiple_choice", "schema", "language_modeling"
STRINGS = {MULTIPLE_CHOICE: ("query",), SCHEMA: ("continuation",), LANGUAGE_MODELING: ("context", "continuation")}
OPTIONS = {MULTIPLE_CHOICE: "choices", SCHEMA: "context_options"}
ENTRY_TYPES = {"label": str, "dataset": str, "num_fewshot": int, "continuation_delimiter": str}


@dataclass(frozen=True)
class CoreTask:
    """A task of the CORE metric.

    `task_type` is "multiple_choice", "schema" or "language_modeling"; `examples` are the lines of its file, in order;
    `baseline` is the accuracy of guessing, in [0, 1).
    """

    label: str
    task_type: str
    examples: Sequence[dict[str, Any]]
    num_fewshot: int
    continuation_delimiter: str
    baseline: float


def load_core(folder: str | Path) -> list[CoreTask]:
    """Read and check the tasks of a folder in either layout.

    Raises:
        UserError: The folder or a file is missing, or an entry or a line is malformed; names file and place.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder with CORE's task table, relative to {Path.cwd()}")
    if (folder / "core.json").is_file():
        table, entries = folder / "core.json", json_entries(folder / "core.json")
    elif (folder / "core.yaml").is_file():
        table, entries = folder / "core.yaml", bundle_entries(folder)
    else:
        raise UserError(f"{folder}: holds neither core.json nor core.yaml; give the folder with CORE's task table")
    tasks = [entry_task(folder, entry, f"{table}: task {number}") for number, entry in enumerate(entries, start=1)]
    if twice := {task.label for task in tasks if sum(task.label == other.label for other in tasks) > 1}:
        raise UserError(f"{table}: label {min(twice)!r} occurs twice; give each task its own label")
    return tasks


def json_entries(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct the file") from error
    return listed(content, "tasks", path)


def bundle_entries(folder: Path) -> list[Any]:
    """Return the bundle's table as entries of `core.json`."""
    path = folder / "core.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error
    baselines = read_baselines(folder / "eval_meta_data.csv")
    return [bundle_entry(entry, baselines) for entry in listed(content, "icl_tasks", path)]


def bundle_entry(entry: Any, baselines: dict[str, float]) -> Any:
    """Convert one entry; missing or malformed fields are left for `entry_task` to report."""
    if not isinstance(entry, dict):
        return entry
    found: dict[str, Any] = {"random_baseline_percent": baselines.get(str(entry.get("label")))}
    if isinstance(entry.get("dataset_uri"), str):
        found["dataset"] = f"eval_data/{entry['dataset_uri']}"
    if isinstance(entry.get("num_fewshot"), list) and entry["num_fewshot"]:
        found["num_fewshot"] = entry["num_fewshot"][0]  # the format allows several; CORE has one
    return entry | found


def listed(content: Any, key: str, path: Path) -> list[Any]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: `{key}` must be a list of tasks; take the published table")
    return entries


def read_baselines(path: Path) -> dict[str, float]:
    """Return the percentage of right guesses by label."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; take it from the bundle, it holds the baselines")
    baselines = {}
    with open(path, encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            try:
                baselines[row["Eval Task"]] = float(row["Random baseline"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}:{rows.line_num}: needs columns `Eval Task` and `Random baseline`, a number"
                ) from error
    return baselines


def entry_task(folder: Path, entry: Any, where: str) -> CoreTask:
    """Return the task of one entry of the table, with the lines of its file."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, found {type(entry).__name__}; correct the table")
    entry = {"continuation_delimiter": " "} | entry
    where += f" ({entry['label']})" if isinstance(entry.get("label"), str) else ""
    for field, kind in ENTRY_TYPES.items():
        if type(entry.get(field)) is not kind:
            raise UserError(f"{where}: `{field}` must be a {kind.__name__}, found {entry.get(field)!r}")
    if entry["num_fewshot"] < 0:
        raise UserError(f"{where}: `num_fewshot` is {entry['num_fewshot']}; it must be at least 0")
    if (task_type := entry.get("icl_task_type")) not in STRINGS:
        raise UserError(f"{where}: `icl_task_type` must be one of {', '.join(STRINGS)}, found {task_type!r}")
    percent = entry.get("random_baseline_percent")
    if type(percent) not in (int, float) or not 0 <= percent < 100:
        raise UserError(
            f"{where}: the random baseline (`random_baseline_percent`, or its row in eval_meta_data.csv) must be a "
            f"percentage from 0 to under 100, found {percent!r}"
        )
    examples = read_examples(folder / entry["dataset"], task_type)
    return CoreTask(
        entry["label"], task_type, examples, entry["num_fewshot"], entry["continuation_delimiter"], 0.01 * percent
    )


def read_examples(path: Path, task_type: str) -> list[dict[str, Any]]:
    examples = []
    for number, record in read_jsonl(path):
        check_example(record, task_type, f"{path}:{number}")
        examples.append(record)
    if not examples:
        raise UserError(f"{path}: no examples; fill the file or remove its task from the table")
    return examples


def check_example(record: dict[str, Any], task_type: str, where: str) -> None:
    options = OPTIONS.get(task_type)
    for field in (*STRINGS[task_type], *((options, "gold") if options else ())):
        if field not in record:
            found = ", ".join(record) or "none"
            raise UserError(f"{where}: a {task_type} example needs `{field}`; fields are {found}")
    require_strings(record, STRINGS[task_type], where)
    if options:
        if not is_list_of_strings(record[options]) or len(record[options]) < 2:
            raise UserError(f"{where}: `{options}` must hold 2 or more strings")
        require_index(record["gold"], "gold", len(record[options]), where)
