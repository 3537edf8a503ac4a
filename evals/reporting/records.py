"""Evaluation results: one JSON record per figure, shown with n and standard error."""

import math
from collections.abc import Sequence
from typing import Any


def make_record(
    task: str, metric: str, value: float, standard_error: float | None, n: int, settings: dict[str, Any], model: str
) -> dict[str, Any]:
    """Return the record of one figure. Non-finite numbers become None, because JSON cannot hold them."""
    return {
        "task": task,
        "metric": metric,
        "value": value if math.isfinite(value) else None,
        "standard_error": standard_error if standard_error is not None and math.isfinite(standard_error) else None,
        "n": n,
        "settings": settings,
        "model": model,
    }


def format_value(record: dict[str, Any]) -> str:
    """Return value and standard error: `84.0 % ± 2.6` for an accuracy, `1.234 ± 0.012` for bits per byte."""
    value, error = record["value"], record["standard_error"]
    if value is None:
        return "not finite"
    if record["metric"] == "bits_per_byte":
        return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
    return f"{100 * value:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def format_count(record: dict[str, Any]) -> str:
    """Return what the figure is a mean over: `200`, or `52,310 bytes`."""
    return f"{record['n']:,} bytes" if record["metric"] == "bits_per_byte" else f"{record['n']:,}"


def summary_line(records: Sequence[dict[str, Any]]) -> str:
    """Return all figures but CORE's tasks in a line: `facts 99.6 %, problems 69 % ± 3, text 0.317 bits per byte`."""
    has_core = any(record["task"] == "core" for record in records)
    shown = [r for r in records if not (has_core and r["task"].startswith("core_"))]
    shown.sort(key=lambda record: record["metric"] == "bits_per_byte")
    return ", ".join(f"{record['task'].replace('_', ' ')} {short_value(record)}" for record in shown)


def short_value(record: dict[str, Any]) -> str:
    """Return whole percent, ± the error if it rounds to at least 1; one decimal where rounding would give 0 or 100."""
    value, error = record["value"], record["standard_error"]
    if value is None:
        return "not finite"
    if record["metric"] == "bits_per_byte":
        return f"{value:.3f} bits per byte"
    rounded = round(100 * value)
    digits = 1 if rounded in (0, 100) and 100 * value != rounded else 0
    shown_error = f" ± {100 * error:.0f}" if error and round(100 * error) else ""
    return f"{100 * value:.{digits}f} %{shown_error}"
