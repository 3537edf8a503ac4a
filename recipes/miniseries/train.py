"""Trains sizes of one family, and shows bits per byte and CORE against FLOPs; or finds the best size for given FLOPs.

    python recipes/miniseries/train.py --config recipes/miniseries/series.yaml
    python recipes/miniseries/train.py --config recipes/miniseries/scaling.yaml
    python recipes/miniseries/train.py --config recipes/miniseries/series.yaml --dry_run true

Notable features:
- data and tokenizer first, by `recipes/run.py`, then `recipes/pretrain.py` once per size, each resumable
- writes `series.json`, `series.md` and `series.svg` after each size, or `scaling.*`
- with `flops`, a parabola through bits per byte over the logarithm of the parameters gives the best size
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evals.reporting.curves import BLUE, ORANGE, STYLE
from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import atomic_write, write_json
from modeling_nanochat.sizes import parameter_counts, scaling_parameters
from modeling_nanochat.text.records import read_jsonl
from recipes.ladder.arguments import RunArguments, parse_overrides
from recipes.ladder.commands import RECIPES, Settings, make_step, script
from recipes.ladder.launch import check_processes, launcher
from recipes.ladder.process import call
from recipes.ladder.step import Step, read_yaml
from recipes.pretrain import PretrainArguments, make_config, make_plan
from recipes.training.arguments import LoopArguments
from recipes.training.stage import OutputArguments, read_record

PRETRAIN, TOKENIZER = RECIPES / "miniseries" / "pretrain.yaml", RECIPES / "miniseries" / "tokenizer.yaml"


@dataclass
class MiniseriesArguments:
    """The sizes, and where to train them."""

    output_dir: str = field(metadata={"help": "Folder for data, tokenizer, models, the table and the plot."})
    depths: list[int] = field(metadata={"help": "Numbers of layers, each trained once, or once with each of flops."})
    flops: list[float] = field(
        default_factory=list, metadata={"help": "FLOPs of a run; without, each has the recipe's tokens per parameter."}
    )
    accelerate_config: str | None = field(default=None, metadata={"help": "File for `accelerate launch`."})
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings of `recipes/run.py --set`: data.key, tokenizer.key, base.key."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the sizes, and train nothing."})


@dataclass
class Run:
    """One trained size, a row of the table; the last three are None until it is finished."""

    depth: int
    width: int
    parameters: int
    scaling_parameters: int
    steps: int
    tokens: int
    ratio: float  # tokens per scaling parameter
    flops: float
    budget: float | None  # the FLOPs asked for
    bits_per_byte: float | None = None
    core: float | None = None
    seconds: float | None = None


def main() -> None:
    (args,) = parse(MiniseriesArguments)
    folder, runs = Path(args.output_dir), list[Run]()
    if not args.dry_run:
        check_processes(args.accelerate_config)
        # Data and tokenizer, or nothing if both are finished
        settings = ["--set", *args.set] if args.set else []
        start([*script("recipes/run.py"), "miniseries", "--run_dir", args.output_dir, *settings])
    for budget in args.flops or [None]:
        for depth in args.depths:
            step = training_step(args, depth, budget)
            runs.append(planned(step, args, budget))
            if not args.dry_run:
                start(step.command)
                measure(runs[-1], folder / name_of(depth, budget))
                write(runs, folder / ("scaling" if args.flops else "series"))
    print(report(runs))


def start(command: list[str]) -> None:
    if call(command, {}):
        raise UserError("fix the error above, then the same command continues")


def name_of(depth: int, budget: float | None) -> str:
    return f"d{depth}" if budget is None else f"d{depth}-{budget:.3g}"


def training_step(args: MiniseriesArguments, depth: int, budget: float | None) -> Step:
    """The command that trains one size."""
    run = RunArguments(run_dir=args.output_dir, accelerate_config=args.accelerate_config)
    program = [*launcher(args.accelerate_config), *script("recipes/pretrain.py")[1:]]
    settings: Settings = {"depth": [str(depth)], "target_flops": None if budget is None else [str(budget)]}
    settings |= {"output_dir": [f"{args.output_dir}/{name_of(depth, budget)}/base"], "resume": ["auto"]}
    return make_step("base", program, PRETRAIN, run, settings, parse_overrides(args.set)["base"])


def planned(step: Step, args: MiniseriesArguments, budget: float | None) -> Run:
    """The row of a size before it is trained."""
    words = ["--config", str(step.config), *step.arguments]
    given, loop, _ = parse(PretrainArguments, LoopArguments, OutputArguments, args=words)
    overrides = dict(pairwise(parse_overrides(args.set)["tokenizer"]))
    config = make_config(given, loop, int(overrides.get("--vocab_size", read_yaml(TOKENIZER)["vocab_size"])))
    plan, total = make_plan(config, given, loop), parameter_counts(config)["total"]
    sizes = (given.depth, config.hidden_size, total, scaling_parameters(config))
    return Run(*sizes, plan.max_steps, plan.tokens, plan.tokens_per_parameter, plan.flops, budget)


def measure(run: Run, folder: Path) -> None:
    """Fill in what the finished run measured last."""
    measured: dict = {}
    for _, row in read_jsonl(folder / "logs" / "base.jsonl"):
        measured |= row
    run.bits_per_byte, run.core = measured["bits_per_byte"], measured.get("core")
    run.seconds = read_record(str(folder / "base"))["seconds"]


def optima(runs: Sequence[Run]) -> list[tuple[float, float, float]]:
    """FLOPs, and the parameters and tokens with the least bits per byte by a parabola, where it has a minimum.

    Parameters are those that count for the horizon; tokens are interpolated between the runs.
    """
    found = []
    for budget in dict.fromkeys(run.budget for run in runs if run.budget):
        of_budget = [run for run in runs if run.budget == budget and run.bits_per_byte]
        if len(of_budget) < 3:
            continue
        of_budget.sort(key=lambda run: run.scaling_parameters)
        sizes = np.log10([run.scaling_parameters for run in of_budget])
        curvature, slope, _ = np.polyfit(sizes, [run.bits_per_byte for run in of_budget], 2)
        best = -slope / (2 * curvature) if curvature > 0 else np.inf
        if sizes[0] <= best <= sizes[-1]:
            tokens = 10 ** np.interp(best, sizes, np.log10([run.tokens for run in of_budget]))
            found.append((budget, float(10**best), float(tokens)))
    return found


def report(runs: Sequence[Run]) -> str:
    """The runs and the best sizes as Markdown."""
    rows = [["depth", "width", "parameters", "scaling", "steps", "tokens", "ratio", "FLOPs", "bpb", "CORE", "hours"]]
    for run in runs:
        row = [f"{run.depth}", f"{run.width:,}", f"{run.parameters / 1e6:,.0f} M"]
        row += [
            f"{run.scaling_parameters / 1e6:,.0f} M",
            f"{run.steps:,}",
            f"{run.tokens / 1e9:.3g} B",
            f"{run.ratio:.3g}",
            f"{run.flops:.3g}",
        ]
        row += ["-" if value is None else f"{value:.4f}" for value in (run.bits_per_byte, run.core)]
        rows.append([*row, "-" if run.seconds is None else f"{run.seconds / 3600:.2f}"])
    best = optima(runs)
    lines = [
        f"best for {flops:.3g} FLOPs: {n / 1e6:,.0f} M parameters, {d / 1e9:.3g} B tokens, ratio {d / n:.3g}"
        for flops, n, d in best
    ]
    if len(best) > 1:
        flops, sizes, tokens = np.log10(np.array(best)).T
        powers = [np.polyfit(flops, values, 1)[0] for values in (sizes, tokens)]
        lines.append("parameters ~ FLOPs^{:.2f}, tokens ~ FLOPs^{:.2f}".format(*powers))
    return "\n\n".join([markdown_table(rows), *lines]) + "\n"


def write(runs: Sequence[Run], path: Path) -> None:
    write_json(path.with_suffix(".json"), list(map(asdict, runs)))
    atomic_write(path.with_suffix(".md"), report(runs))
    draw(runs, path.with_suffix(".svg"))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Bits per byte and CORE against FLOPs; in a sweep against parameters, a line for each of `flops`."""
    budgets = list(dict.fromkeys(run.budget for run in runs))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.4))
        for place, key in enumerate(("bits_per_byte", "core"), start=1):
            axes = figure.add_subplot(1, 2, place)
            axes.set(xscale="log", ylabel="bits per byte, held-out text" if place == 1 else "CORE")
            axes.set_xlabel("FLOPs" if budgets == [None] else "parameters in matrices and head")
            for budget in budgets:
                points = [run for run in runs if run.budget == budget and getattr(run, key) is not None]
                x = [run.flops if budget is None else run.scaling_parameters for run in points]
                color = (BLUE if place == 1 else ORANGE) if budget is None else None
                label = None if budget is None else f"{budget:.3g} FLOPs"
                axes.plot(x, [getattr(run, key) for run in points], marker="o", color=color, label=label)
            if budgets != [None]:
                axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    exit_on_user_error(main)
