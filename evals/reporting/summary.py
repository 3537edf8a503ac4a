"""The report's summary table: one row per figure, one column per model, with n and standard errors."""

import math
from typing import Any

from .records import format_count, format_value
from .run_folder import MODELS, RunFolder

NOTHING = "-"


def summary_rows(run: RunFolder) -> list[list[str]]:
    """Return header and rows; n is shown once per row, and again in cells where it differs. "-" means no figure."""
    rows = [["task, metric", "n", *MODELS.values()]]
    for task, metric in run.figures():
        records = [run.record(stage, task, metric) for stage in MODELS]
        first = next(record for record in records if record)
        cells = [NOTHING if record is None else cell(record, first["n"]) for record in records]
        rows.append([label(first), format_count(first), *cells])
    return rows


def cell(record: dict[str, Any], common: int) -> str:
    own = "" if record["n"] == common else f" (n={format_count(record)})"
    return format_value(record) + own


def label(record: dict[str, Any]) -> str:
    """Return `text, bits per byte` or `letters, accuracy (guessing 25 %)`."""
    baseline = record.get("settings", {}).get("baseline") or 0
    guessing = f" (guessing {100 * baseline:.0f} %)" if baseline else ""
    return f"{record['task']}, {record['metric']}".replace("_", " ") + guessing


def warnings(run: RunFolder) -> list[str]:
    """Return the stages' warnings of failed training, see `recipes/training/learning.py`."""
    return [
        f"{name}: {text}" for stage, name in MODELS.items() for text in run.stages.get(stage, {}).get("warnings", ())
    ]


def evaluation_notes(run: RunFolder) -> list[str]:
    """Return the notes in the evaluation records."""
    records = [
        (name, record) for stage, name in MODELS.items() for record in run.results.get(stage, {}).get("records", ())
    ]
    return [
        f"{name}, {record['task'].replace('_', ' ')}: {record['note']}" for name, record in records if "note" in record
    ]


def comparisons(run: RunFolder, before: str = "sft", after: str = "rl") -> list[str]:
    """Return one line per figure of both models: the difference, its standard error, and whether it exceeds that."""
    lines = []
    for task, metric in run.figures():
        old, new = run.record(before, task, metric), run.record(after, task, metric)
        if old and new and old["value"] is not None and new["value"] is not None:
            lines.append(f"{label(new)}: {comparison(old, new)}")
    return lines or [f"{MODELS[after]} against {MODELS[before]}: not both evaluated"]


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    difference, errors = new["value"] - old["value"], (old["standard_error"], new["standard_error"])
    scale, unit, digits = (1, "", 3) if new["metric"] == "bits_per_byte" else (100, " points", 1)
    figures = f"{format_value(old)} -> {format_value(new)}, {scale * difference:+.{digits}f}{unit}"
    if None in errors:
        return figures
    error = math.hypot(*errors)
    word = "higher" if difference > 0 else "lower"
    verdict = f"{word} by more than its standard error" if abs(difference) > error else "within its standard error"
    return f"{figures} ± {scale * error:.{digits}f}: {verdict}"
