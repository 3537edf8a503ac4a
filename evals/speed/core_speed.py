"""Measures how much faster CORE is than scoring one prompt at a time, and whether its results are the same.

    python evals/speed/core_speed.py --model_name_or_path runs/laptop/base --core_dir data/core
    python evals/speed/core_speed.py --model_name_or_path runs/laptop/base --core_dir data/core --processes 2

One at a time is `batch_size=1`: every prompt is read whole and alone. Both alternate in one process; figures are
medians. With `--processes`, all tasks are also shared among several processes of one thread each, and compared with
one such process. The last line is JSON with all results. The command fails if an example is graded differently.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.core.score import CoreResult, core, load_core
from evals.core.tasks import MULTIPLE_CHOICE, CoreTask
from evals.speed.device_peaks import device_name
from evals.speed.timing import seconds_of, take_turns
from modeling_nanochat.cli import parse, text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer

FEW_SHOT = 10
Measured = dict[str, Any]  # {"task", "shots", "kind", "alone", "together", "equal"}, times in seconds


@dataclass
class CoreSpeedArguments:
    """The model, the tasks, and how often each is measured."""

    model_name_or_path: str = field(metadata={"help": "Model folder or Hub id."})
    core_dir: str = field(metadata={"help": "Folder with the CORE tasks (core.json or core.yaml)."})
    core_max_per_task: int = field(default=16, metadata={"help": "Examples per task."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens per prompt; the model's context if unset."})
    batch_size: int = field(default=32, metadata={"help": "Examples per forward pass."})
    repeats: int = field(default=3, metadata={"help": "Timed runs of each task."})
    processes: int = field(default=0, metadata={"help": "Processes that share the tasks; 0 skips this measurement."})

    def check(self) -> None:
        """Raise [`UserError`] on an invalid setting."""
        least = {"core_max_per_task": 1, "batch_size": 2, "repeats": 1, "processes": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {value}")

    def core(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: list[CoreTask], **options: Any
    ) -> CoreResult:
        options = {"batch_size": self.batch_size} | options
        return core(
            model, tokenizer, tasks, max_per_task=self.core_max_per_task, max_length=self.max_length, **options
        )


def main() -> None:
    (args,) = parse(CoreSpeedArguments)
    args.check()
    tasks = load_core(args.core_dir)
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path)
    device = model.device.type
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = [measure(args, model, tokenizer, task, device) for task in tasks]
    found: dict[str, Any] = {"all tasks": ratio(rows)}
    if few_shot := [row for row in rows if row["kind"] == MULTIPLE_CHOICE and row["shots"] == FEW_SHOT]:
        found["10-shot multiple choice"] = ratio(few_shot)
    if args.processes:
        found[f"{args.processes} processes / one"] = ratio_of_processes(args)
    print_results(rows, found)
    print(f"\n{json.dumps({'settings': asdict(args), 'tasks': rows, 'ratios': found})}")
    if wrong := [row["task"] for row in rows if not row["equal"]]:
        raise UserError(f"{', '.join(wrong)}: examples are graded differently one at a time; do not compare speeds")


def measure(
    args: CoreSpeedArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: CoreTask, device: str
) -> Measured:
    run = partial(args.core, model, tokenizer, [task])
    results, seconds = take_turns({"alone": partial(run, batch_size=1), "together": run}, device, args.repeats, 1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    equal = results["alone"].right == results["together"].right
    return {"task": task.label, "shots": task.num_fewshot, "kind": task.task_type, **medians, "equal": equal}


def ratio(rows: Iterable[Measured]) -> float:
    rows = list(rows)
    return sum(row["alone"] for row in rows) / sum(row["together"] for row in rows)


def print_results(rows: list[Measured], found: dict[str, float]) -> None:
    cells = [["task", "shots", "one at a time, s", "together, s", "times faster", "equal"]]
    for row in rows:
        figures = [f"{row['alone']:.2f}", f"{row['together']:.2f}", f"{ratio([row]):.2f}"]
        cells.append([row["task"], str(row["shots"]), *figures, "yes" if row["equal"] else "NO"])
    print(text_table(cells))
    for name, value in found.items():
        print(f"{name}: {value:.2f} times faster")


def ratio_of_processes(args: CoreSpeedArguments) -> float:
    """Return how much longer one process takes for all tasks than `args.processes` together."""
    context, seconds = get_context("spawn"), []
    for count in (1, args.processes):
        with context.Manager() as manager, ProcessPoolExecutor(count, context) as pool:
            loaded = manager.Barrier(count)
            shares = [pool.submit(run_share, args, index, count, loaded) for index in range(count)]
            seconds.append(max(share.result() for share in shares))
    return seconds[0] / seconds[1]


def run_share(args: CoreSpeedArguments, index: int, count: int, loaded: Any) -> float:
    """Return the seconds that process `index` of `count` takes for its share of the tasks, once all have loaded."""
    torch.set_num_threads(1)
    tasks = load_core(args.core_dir)
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path)
    options = {"process_index": index, "num_processes": count, "gather": lambda grades: grades}
    loaded.wait()
    return seconds_of(lambda: args.core(model, tokenizer, tasks, **options), model.device.type)


if __name__ == "__main__":
    exit_on_user_error(main)
