"""Read a recipe's run folder: logs, stage records, evaluation results, and the description of its synthetic world."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_jsonl

MODELS = {stage.name: stage.title for stage in STAGES.values()}
REPORTED = {"tokenizer": "Tokenizer"} | MODELS


@dataclass
class RunFolder:
    """The files of a run. Dictionaries are keyed by stage, without the missing stages; nothing depends on the clock.

    `results` are those of models; `tokenizer` is results/tokenizer.json, the evaluation of the tokenizer. `steps` is
    keyed by the runner's steps, which include "data" and "<stage>.eval".
    """

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    world: dict[str, Any] | None = None
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def wall_seconds(self, stage: str) -> float | None:
        """Return the duration of the stage's process if the runner timed it, else the stage's own count."""
        timed = self.steps.get(stage, {}).get("seconds")
        return timed if timed is not None else self.stages.get(stage, {}).get("seconds")

    def evaluation_seconds(self, stage: str) -> float | None:
        timed = self.steps.get(f"{stage}.eval", {}).get("seconds")
        result = (self.tokenizer or {}) if stage == "tokenizer" else self.results.get(stage, {})
        return timed if timed is not None else result.get("seconds")

    def series(self, stage: str, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of the log rows that have `key`."""
        rows = [row for row in self.logs.get(stage, []) if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def estimated(self, stage: str) -> list[str]:
        """Return the keys of the log rows that have a standard error, in the order of their first row."""
        keys = dict.fromkeys(key for row in self.logs.get(stage, []) for key in row)
        return [key for key in keys if f"{key}_standard_error" in keys]

    def record(self, stage: str, task: str, metric: str) -> dict[str, Any] | None:
        """Return the stage's evaluation record of one figure."""
        records = self.results.get(stage, {}).get("records", [])
        return next((r for r in records if (r["task"], r["metric"]) == (task, metric)), None)

    def figures(self) -> list[tuple[str, str]]:
        """Return all (task, metric) pairs of any stage, bits per byte first, then in the order of evaluation."""
        records = [record for result in self.results.values() for record in result["records"]]
        pairs = dict.fromkeys((record["task"], record["metric"]) for record in records)
        return sorted(pairs, key=lambda pair: pair[1] != "bits_per_byte")


def read_run(path: str | Path) -> RunFolder:
    """Read a run folder, which may be incomplete.

    Raises:
        UserError: The folder is missing or holds no run, or a file in it is not what a run writes.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder, for example runs/pocket")
    run = RunFolder(path)
    for stage in REPORTED:
        if (file := path / "stages" / f"{stage}.json").is_file():
            run.stages[stage] = read_object(file, ("stage", "seconds"))
        if (file := path / "results" / f"{stage}.json").is_file() and stage in MODELS:
            run.results[stage] = read_object(file, ("model", "seconds", "records"))
        if (file := path / "logs" / f"{stage}.jsonl").is_file():
            run.logs[stage] = [row for _, row in read_jsonl(file)]
    if (file := path / "results" / "tokenizer.json").is_file():
        keys = ("seconds", "settings", "vocabularies", "missing", "texts", "table", "statistics")
        run.tokenizer = read_object(file, keys)
    for file in sorted((path / "finished").glob("*.json")):
        run.steps[file.stem] = read_object(file, ())
    if not (run.stages or run.results or run.logs or run.tokenizer):
        raise UserError(f"{path}: holds no stages/, results/ or logs/; train first, or give another folder")
    if (file := path / "data" / "world.json").is_file():
        run.world = read_object(file, ())
    return run


def read_object(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); delete it and redo the stage") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise UserError(f"{file}: lacks {', '.join(missing) or 'an object'}; delete it and redo the stage")
    return content
