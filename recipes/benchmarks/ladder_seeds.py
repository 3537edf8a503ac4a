"""Runs a recipe's ladder for several seeds, evaluates every stage on all questions, and writes a table.

    python recipes/benchmarks/ladder_seeds.py --recipe pocket --seeds 0 1 2 3 4 --run_dir runs/seeds

Notable features:
- each seed applies to the generated world and to every training stage
- writes all predictions to `<run_dir>/<seed>/evaluation/`, means and standard deviations to `<run_dir>/table.md`
- compares RL with SFT question by question: gained, lost, and McNemar's exact test
- an interrupted run continues with the same command
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.evaluate_model import EvaluateArguments, hide_library_bars, run_evaluation
from evals.reporting.records import summary_line
from evals.reporting.run_folder import MODELS, read_object, read_run
from evals.reporting.summary import NOTHING
from evals.tasks.table import answered_in_words
from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import atomic_write, write_json
from modeling_nanochat.text.records import read_jsonl
from recipes.ladder.commands import RECIPES
from recipes.ladder.step import read_yaml

SEEDED = ("data", *MODELS)
UNKNOWN = "unknown"  # the task that asks about things outside the world
SAMPLED = "sampled"
PREDICTIONS = "predictions.jsonl"
PAGE = {"temperature": 0.6, "top_k": 50}  # the page's sampling settings


@dataclass
class LadderSeedsArguments:
    """Recipe, seeds and output folder."""

    run_dir: str = field(metadata={"help": "Folder for table.md and the runs, one folder per seed."})
    recipe: str = field(default="pocket", metadata={"help": "A recipe with a generated world."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of the world and of training."}
    )
    set: list[str] = field(
        default_factory=list, metadata={"help": "Further stage settings for run.py, each stage.key=value."}
    )
    in_world_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks about the world; default: all generative tasks except unknown."},
    )
    refusal: str = field(default="I do not know that", metadata={"help": "Phrase that identifies a refusal."})
    sampled_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks for the page's settings, in addition to data/eval/shown, each name=file.jsonl."},
    )

    def check(self) -> None:
        """Raise [`UserError`] on an invalid setting."""
        if not (RECIPES / self.recipe / "run.yaml").is_file():
            raise UserError(f"recipe: {self.recipe!r} does not exist; recipes/ has a folder for each")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds: give at least one, without duplicates, for instance 0 1 2 3 4")
        if not self.refusal.strip():
            raise UserError("refusal is empty, so every reply would match; give the words of a refusal")


@dataclass
class SeedResults:
    """Results of one seed: records and predictions of each evaluation, and the cost of its ladder."""

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    def record(self, stage: str, task: str, metric: str) -> dict[str, Any] | None:
        records = self.records.get(stage, [])
        return next((record for record in records if (record["task"], record["metric"]) == (task, metric)), None)

    def rows(self, stage: str, task: str) -> list[dict[str, Any]]:
        return [row for row in self.predictions.get(stage, []) if row["task"] == task]


def main() -> None:
    (args,) = parse(LadderSeedsArguments)
    args.check()
    hide_library_bars()
    results: dict[int, SeedResults] = {}
    for seed in args.seeds:
        run = Path(args.run_dir) / str(seed)
        run_ladder(run, seed, args)
        evaluate_stages(run, args)
        results[seed] = read_results(run)
        atomic_write(Path(args.run_dir) / "table.md", table(results, args))
    print(f"{len(results)} seeds, table in {args.run_dir}/table.md")


def run_ladder(run: Path, seed: int, args: LadderSeedsArguments) -> None:
    """Run the recipe into `run` unless it is already finished.

    Raises:
        UserError: The ladder failed or was interrupted.
    """
    if (run / "finished" / "report.json").is_file():
        print(f"seed {seed}: already finished, skipped")
        return
    settings = [*args.set, *(f"{stage}.seed={seed}" for stage in SEEDED)]
    command = [sys.executable, str(RECIPES / "run.py"), args.recipe, "--run_dir", str(run), "--set", *settings]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"seed {seed}: the ladder stopped with exit code {code}; the same command continues")


def evaluate_stages(run: Path, args: LadderSeedsArguments) -> None:
    """Evaluate every stage on all files of data/eval with greedy decoding, then RL at the page's sampling settings."""
    files = task_files(run / "data" / "eval")
    text = [str(path) for path in [run / "data" / "pretrain" / "val.parquet"] if path.is_file()]
    for stage in MODELS:
        evaluate_once(run, stage, stage, args, tasks=files, text_files=text, base_model=not STAGES[stage].chats)
    if sampled := [*task_files(run / "data" / "eval" / "shown"), *args.sampled_files]:
        evaluate_once(run, "rl", SAMPLED, args, tasks=sampled, **PAGE)


def task_files(folder: Path) -> list[str]:
    return [f"{path.stem}={path}" for path in sorted(folder.glob("*.jsonl"))]


def evaluate_once(run: Path, stage: str, name: str, args: LadderSeedsArguments, **settings: Any) -> None:
    """Evaluate the model of `stage` into evaluation/<name>, unless done already with this model and settings.

    done.json, written last, records which model and settings produced the results.
    """
    folder, done = run / "evaluation" / name, run / "evaluation" / name / "done.json"
    recipe = read_yaml(RECIPES / args.recipe / "eval.yaml")
    settings |= {key: recipe[key] for key in ("batch_size", "max_new_tokens") if key in recipe}
    finished = read_object(run / "stages" / f"{stage}.json", ("finished",))["finished"]
    wanted = {"model_finished": finished, "settings": settings}
    if done.is_file() and read_object(done, ()) == wanted:
        return
    outputs = {"output_file": str(folder / "results.json"), "output_predictions": str(folder / PREDICTIONS)}
    results = run_evaluation(EvaluateArguments(model_name_or_path=str(run / stage), **outputs, **settings))
    write_json(done, wanted)
    print(f"{run.name}, {name}: {summary_line(results['records'])}", flush=True)


def read_results(run: Path) -> SeedResults:
    """Read the evaluations and the ladder's own records in `run`."""
    results, ladder = SeedResults(), read_run(run)
    for done in sorted((run / "evaluation").glob("*/done.json")):
        name = done.parent.name
        results.records[name] = read_object(done.with_name("results.json"), ("records",))["records"]
        results.predictions[name] = [row for _, row in read_jsonl(done.with_name(PREDICTIONS))]
    results.seconds = sum(step.get("seconds", 0.0) for step in ladder.steps.values())
    memory = [record.get("machine", {}).get("peak_memory_mib", 0) for record in ladder.stages.values()]
    results.peak_memory_mib = max(memory, default=0)
    return results


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test; under the null hypothesis gains and losses are equally likely."""
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def gained_and_lost(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """The numbers of questions that only `after` and only `before` answers correctly.

    Raises:
        UserError: The predictions are not for the same questions.
    """
    if [row["index"] for row in before] != [row["index"] for row in after]:
        raise UserError("two models were not asked the same questions; delete evaluation/ and evaluate again")
    pairs = [(old["right"], new["right"]) for old, new in zip(before, after, strict=True)]
    return pairs.count((False, True)), pairs.count((True, False))


def refused(rows: Iterable[dict[str, Any]], refusal: str) -> float:
    """Fraction of the replies that contain `refusal`."""
    return statistics.fmean(refusal in row["reply"] for row in rows)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), which is None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def percent(values: Sequence[float]) -> str:
    return figure([100 * value for value in values], ".1f", " %")


def figure(values: Sequence[float], digits: str, unit: str = "") -> str:
    """Mean and standard deviation as `98.0 % ± 0.6`; a dash for no values."""
    if not values:
        return NOTHING
    mean, spread = mean_and_spread(values)
    return f"{mean:{digits}}{unit}" + ("" if spread is None else f" ± {spread:{digits}}")


def table(results: dict[int, SeedResults], args: LadderSeedsArguments) -> str:
    """All sections as Markdown."""
    seeds = ", ".join(map(str, results))
    parts = [f"`{args.recipe}`, seeds {seeds}: mean ± standard deviation over the seeds. n is per seed."]
    parts += ["## Held-out questions", markdown_table(figures_rows(results, args))]
    parts += ["## Cost of a ladder", markdown_table(cost_rows(results))]
    parts += ["## RL against SFT, question by question", markdown_table(paired_rows(results))]
    if any(SAMPLED in of_seed.records for of_seed in results.values()):
        heading = f"## RL at temperature {PAGE['temperature']}, top_k {PAGE['top_k']}"
        parts += [heading, markdown_table(sampled_rows(results))]
    return "\n\n".join(parts) + "\n"


def figures_rows(results: dict[int, SeedResults], args: LadderSeedsArguments) -> list[list[str]]:
    rows = [["task", "n", *MODELS.values()]]
    for task, metric in figures_of(results, MODELS):
        columns = [found(results, stage, task, metric) for stage in MODELS]
        cells = [value_cell([record["value"] for record in records], metric) for records in columns]
        rows.append([task.replace("_", " "), counts([r["n"] for records in columns for r in records]), *cells])
    tasks = in_world_tasks(results, args)
    asked = {stage: replies(results, stage, tasks) for stage in MODELS}
    cells = [percent([refused(rows, args.refusal) for rows in of_stage]) for of_stage in asked.values()]
    sizes = [len(rows) for of_stage in asked.values() for rows in of_stage]
    return [*rows, ["in-world questions refused", counts(sizes), *cells]] if sizes else rows


def figures_of(results: dict[int, SeedResults], stages: Iterable[str]) -> list[tuple[str, str]]:
    """All (task, metric) pairs of any seed and stage, in order of evaluation."""
    records = [r for of_seed in results.values() for stage in stages for r in of_seed.records.get(stage, [])]
    return list(dict.fromkeys((record["task"], record["metric"]) for record in records))


def found(results: dict[int, SeedResults], stage: str, task: str, metric: str) -> list[dict[str, Any]]:
    """The records of one figure, for seeds that have it with a finite value."""
    records = [of_seed.record(stage, task, metric) for of_seed in results.values()]
    return [record for record in records if record and record["value"] is not None]


def value_cell(values: Sequence[float], metric: str) -> str:
    return figure(values, ".3f", " bits per byte") if metric == "bits_per_byte" else percent(values)


def counts(sizes: Sequence[int]) -> str:
    """`1,000`, or `960-1,000` if seeds differ."""
    if not sizes:
        return NOTHING
    least, most = min(sizes), max(sizes)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def in_world_tasks(results: dict[int, SeedResults], args: LadderSeedsArguments) -> list[str]:
    """The tasks that ask about the world.

    Raises:
        UserError: A requested task is not a generative task.
    """
    records = [r for of_seed in results.values() for stage in MODELS for r in of_seed.records.get(stage, [])]
    in_words = dict.fromkeys(r["task"] for r in records if r["settings"].get("kind") in answered_in_words())
    if missing := [task for task in args.in_world_tasks if task not in in_words]:
        raise UserError(f"in_world_tasks: no {', '.join(missing)}; there are {', '.join(in_words) or 'none'}")
    return args.in_world_tasks or [task for task in in_words if task != UNKNOWN]


def replies(results: dict[int, SeedResults], stage: str, tasks: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The predictions for `tasks`, per seed that has any."""
    of_seeds = [[row for task in tasks for row in of_seed.rows(stage, task)] for of_seed in results.values()]
    return [rows for rows in of_seeds if rows]


def cost_rows(results: dict[int, SeedResults]) -> list[list[str]]:
    seconds = [of_seed.seconds for of_seed in results.values()]
    memory = [of_seed.peak_memory_mib / 1024 for of_seed in results.values()]
    return [
        ["", "mean ± standard deviation", "most"],
        ["seconds, evaluation and report included", figure(seconds, ".0f"), f"{max(seconds):.0f}"],
        ["peak memory of a stage, GiB", figure(memory, ".2f"), f"{max(memory):.2f}"],
    ]


def paired_rows(results: dict[int, SeedResults], before: str = "sft", after: str = "rl") -> list[list[str]]:
    rows = [["task", "seed", "n", MODELS[before], MODELS[after], "gained", "lost", "p"]]
    for task, metric in figures_of(results, (before, after)):
        for seed, of_seed in results.items():
            old, new = of_seed.rows(before, task), of_seed.rows(after, task)
            if not old or not new or metric == "bits_per_byte":
                continue
            gained, lost = gained_and_lost(old, new)
            shares = [percent([statistics.fmean(row["right"] for row in rows)]) for rows in (old, new)]
            p = f"{mcnemar_p(gained, lost):.2g}"
            rows.append([task.replace("_", " "), str(seed), f"{len(new):,}", *shares, str(gained), str(lost), p])
    return rows


def sampled_rows(results: dict[int, SeedResults]) -> list[list[str]]:
    rows = [["task", "n", "right", "least"]]
    for task, metric in figures_of(results, [SAMPLED]):
        records = found(results, SAMPLED, task, metric)
        values = [record["value"] for record in records]
        least = percent([min(values)]) if values else NOTHING
        rows.append([task.replace("_", " "), counts([record["n"] for record in records]), percent(values), least])
    return rows


if __name__ == "__main__":
    exit_on_user_error(main)
