"""Results of the tasks finished so far, kept beside the output file: an evaluation that was interrupted goes on.

`<output_file>.partial` has a line that says which evaluation it belongs to, and one per finished task.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.harness.processes import ALONE, Processes
from evals.tasks.evaluation import TaskResult
from modeling_nanochat.errors import UserError
from modeling_nanochat.folders import write_jsonl

FORMAT = 1  # raised with every change of the lines


def hash_of(value: Any) -> str:
    """Return a hash of the representation of `value`."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint(path: str | Path) -> list[list[Any]]:
    """Return names, sizes and times of a file, or of all files in a folder; the name alone of what is on the Hub."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return found or [[str(path)]]


class PartialResults:
    """The finished tasks of an evaluation; those of an earlier, interrupted one are taken over.

    Args:
        output_file: The evaluation's, beside which they are kept.
        key: What they depend on, see `hash_of`.
        started: When the evaluation began, by `time.perf_counter`.
        processes: Those that evaluate together; the first one reads and writes.
    """

    def __init__(self, output_file: str, key: str, started: float, processes: Processes = ALONE):
        self.path, self.processes = Path(f"{output_file}.partial"), processes
        self.header = {"format": FORMAT, "key": key}
        self.finished: dict[str, TaskResult] = {}
        self.spent: dict[str, float] = {}  # seconds of each task
        self.started = started
        rows = processes.agree(self.read() if processes.is_first else [])
        for row in rows:
            self.finished[row["task"]], self.spent[row["task"]] = TaskResult(**row["result"]), row["seconds"]
        if processes.is_first:
            if rows:
                print(f"{self.path}: goes on after {', '.join(self.finished)}", flush=True)
            write_jsonl(self.path, [self.header, *rows])
        self.earlier = sum(self.spent.values())

    def read(self) -> list[dict[str, Any]]:
        """Return the lines of the finished tasks; none if the file belongs to another evaluation."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        rows = [row for line in lines if isinstance(row := parsed(line), dict)]
        if rows[:1] == [self.header]:
            return rows[1:]
        if lines:
            print(f"{self.path}: of another model, other settings or data; starting anew", flush=True)
        return []

    def run(self, parts: Mapping[str, Callable[[], TaskResult]]) -> None:
        """Run the parts that are not finished; the result of each is on disk before the next one starts."""
        for task, part in parts.items():
            if task in self.finished:
                continue
            started = time.perf_counter()
            result, seconds = part(), round(time.perf_counter() - started, 1)
            self.finished[task], self.spent[task] = result, seconds
            if self.processes.is_first:
                append(self.path, {"task": task, "seconds": seconds, "result": asdict(result)})

    @property
    def seconds(self) -> float:
        """Duration of the evaluation, with what an earlier one has spent on the tasks taken over."""
        return round(self.earlier + time.perf_counter() - self.started, 1)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # torn, because the process was killed while it wrote
        return None


def check_writable(path: str, setting: str) -> None:
    """Raise [`UserError`] unless a file can be written at `path`."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "it is a folder")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be written ({error.strerror}); give another path") from error
