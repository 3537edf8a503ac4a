"""The whole ladder: data, tokenizer, pretrain, midtrain, SFT, GRPO, evaluation after each, report card.

    python recipes/run.py pocket

    python recipes/run.py pocket --from sft                      # redo from there
    python recipes/run.py pocket --config my_data.yaml           # your files in place of the generated world
    python recipes/run.py pocket --set base.depth=6 'base.sample_prompts=["Once upon a time, there", "One day"]'

Notable features:
- every stage is a process of its own, the same command that you would type
- what is finished is found and skipped, and a stage that was stopped goes on from its last checkpoint
- the log is short; `--verbose true` shows the commands, all settings, evaluations and tables, and the libraries' bars
- a folder that this run did not make is never replaced, unless `--from` asks for it
- settings and files of every stage are checked before the first one runs (`recipes/preflight.py`)
- `--set stage.key=value` reaches any key of any stage
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: an end without traceback

import json
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import yaml

from evals.records import write_json
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.sources import first_line
from recipes.ladder_log import closing_lines, outcome_lines, title
from recipes.stage_process import call, can_fork, check_in_fork, stage_environment

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
STAGES = ("data", "tokenizer", "base", "mid", "sft", "rl", "report")
ALIASES = {"pretrain": "base", "midtrain": "mid", "grpo": "rl"}
SCRIPTS = {"base": "pretrain", "mid": "midtrain", "sft": "sft", "rl": "grpo"}
# How a stage with checkpoints goes on; the others are short and start over.
RESUME = {"base": "--resume", "mid": "--resume", "sft": "--resume_from_checkpoint", "rl": "--resume_from_checkpoint"}
# What `accelerate_configs/cpu.yaml` says: nothing that needs a launcher.
ONE_CPU_PROCESS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "num_machines": 1,
    "num_processes": 1,
    "machine_rank": 0,
    "mixed_precision": "no",
    "use_cpu": True,
}
PREDECESSOR = {"mid": "base", "sft": "mid", "rl": "sft"}
# What a recipe's generated world provides, and where the recipe says so: file and key.
GENERATED = {
    "pretrain_files": ("pretrain.yaml", "train_files"),
    "val_files": ("pretrain.yaml", "val_files"),
    "midtrain_files": ("midtrain.yaml", "train_files"),
    "sft_files": ("sft.yaml", "train_files"),
    "grpo_files": ("grpo.yaml", "train_files"),
    "eval_files": ("eval.yaml", "eval_files"),
}


@dataclass
class RunArguments:
    """One run of a recipe. Files that are not given come from the recipe's generated world."""

    run_dir: str = field(metadata={"help": "Folder for everything that the run leaves."})
    accelerate_config: str = field(metadata={"help": "File for `accelerate launch --config_file`."})
    pretrain_files: list[str] | None = field(default=None, metadata={"help": "Running text: parquet, JSONL, text."})
    val_files: list[str] | None = field(default=None, metadata={"help": "Running text for bits per byte."})
    midtrain_files: list[str] | None = field(default=None, metadata={"help": "Conversations for midtraining, JSONL."})
    sft_files: list[str] | None = field(default=None, metadata={"help": "Conversations for SFT, JSONL."})
    grpo_files: list[str] | None = field(default=None, metadata={"help": "Word problems as in GSM8K, JSONL."})
    eval_files: list[str] | None = field(default=None, metadata={"help": "Tasks, each name=file.jsonl."})
    examples: list[str] = field(
        default_factory=list,
        metadata={"help": "Questions shown in the chat and on the page; written into the model folders."},
    )
    verbose: bool = field(
        default=False, metadata={"help": "Print commands, all settings and evaluations, tables, and the libraries' bars."}
    )
    next: str | None = field(
        default=None, metadata={"help": "What the last line says to type next; default: the commands of chat and page."}
    )
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Settings of stages, each stage.key=value, for instance base.depth=6. Commas separate the values of a "
            "list; for a value with a comma in it write YAML: 'base.sample_prompts=[\"Once upon a time, there\"]'."
        },
    )
    from_stage: str | None = field(
        default=None,
        metadata={
            "aliases": ["--from"],
            "help": f"Redo this stage and the later ones, those before it as they are: {', '.join(STAGES)}.",
        },
    )
    to_stage: str = field(default="report", metadata={"aliases": ["--to"], "help": "Stop after this stage."})


@dataclass
class Step:
    """One command of the ladder: its name, the script with its launcher, its YAML, its arguments.

    `<run>/started/<name>.json` says that the run has begun it and with what settings, `<run>/finished/<name>.json` that
    it also saw its end.
    """

    name: str
    program: list[str]
    config: Path | None
    arguments: list[str]

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def command(self) -> list[str]:
        config = ["--config", os.path.relpath(self.config)] if self.config else []
        return [*self.program, *config, *self.arguments]

    @property
    def settings(self) -> dict[str, list[str]]:
        """The arguments as flag -> values; of a flag given twice the last one holds, as on a command line."""
        settings: dict[str, list[str]] = {}
        for word in self.arguments:
            if word.startswith("--"):
                settings[word[2:]] = []
            else:
                settings[list(settings)[-1]].append(word)
        return settings

    @property
    def result(self) -> Path | None:
        """What the step leaves."""
        if self.name == "report":
            return Path(self.settings["run_dir"][0], "report.md")
        path = self.settings.get("output_dir") or self.settings.get("output_file")
        return Path(path[0]) if path else None

    @property
    def makes_folder(self) -> bool:
        return "output_dir" in self.settings

    @property
    def is_measurement(self) -> bool:
        """Whether the step makes figures and no model: it is cheap, and the ladder's log has a line for its tables."""
        return self.name.endswith(".eval") or self.name == "report"

    @property
    def record(self) -> Path | None:
        """The file that the step itself writes last, and so the sign that it is finished; None if it has none."""
        if self.makes_folder and self.name != "data":
            return self.result.parent / "stages" / f"{self.result.name}.json"
        return None if self.makes_folder else self.result

    def fingerprint(self, run_dir: Path) -> dict:
        """What the result depends on apart from the files' content; the run folder itself may be moved or copied."""
        arguments = {
            key: [word.replace(str(run_dir), "{run_dir}") for word in words] for key, words in self.settings.items()
        }
        return {"arguments": arguments, "config": read_yaml(self.config) if self.config else {}}


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); every recipe needs it, as recipes/pocket has it") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct the file") from error


def main() -> None:
    recipe, words = recipe_and_words(sys.argv[1:])
    (args,) = parse(RunArguments, args=words)
    first = stage_number(args.from_stage) if args.from_stage else None
    last = stage_number(args.to_stage)
    if first is not None and first > last:
        raise UserError(f"--from {args.from_stage} comes after --to {args.to_stage}: nothing to do; give a later --to")
    overrides, run_dir = parse_overrides(args.set), Path(args.run_dir)
    started = time.perf_counter()
    with only_run(run_dir) as lock:
        ladder = {stage: steps(stage, RECIPES / recipe, args, overrides) for stage in STAGES[: last + 1]}
        ladder = {stage: of_stage for stage, of_stage in ladder.items() if of_stage}
        plan = make_plan(ladder, run_dir, first)
        os.environ.update(stage_environment(args.verbose))
        check_before([step for step, todo, _ in plan if todo])
        print_skipped(plan, run_dir)
        run_plan(plan, list(ladder), run_dir, args.verbose, lock)
    print("\nnothing was left to do" if not any(todo for _, todo, _ in plan) else "")
    seconds, next_commands = time.perf_counter() - started, args.next or chat_commands(ladder, args.run_dir)
    print("\n".join(closing_lines(recipe, run_dir, list(ladder), seconds, next_commands)))


def run_plan(plan: list[tuple[Step, bool, bool]], stages: list[str], run_dir: Path, verbose: bool, lock: int) -> None:
    """Run what is to be done, under a title for each stage."""
    titled = None
    for step, _, redo in (entry for entry in plan if entry[1]):
        if step.stage != titled:
            titled = step.stage
            print(f"\n[{stages.index(titled) + 1}/{len(stages)}] {title(step.name)}", flush=True)
        run_step(step, run_dir, redo, lock, verbose)
        if step.is_measurement and not verbose and (lines := outcome_lines(step.result)):
            print("\n".join(lines), flush=True)


def print_skipped(plan: list[tuple[Step, bool, bool]], run_dir: Path) -> None:
    skipped = [step.name for step, todo, _ in plan if not todo]
    own = [name for name in skipped if is_own(name, run_dir)]
    for names, what in ((own, "finished before"), ([name for name in skipped if name not in own], "not made by this run, kept")):
        if names:
            print(f"{what}: {', '.join(names)}")


def chat_commands(ladder: dict[str, list[Step]], run_dir: str) -> str:
    """How to talk to the last model that can; how to go on where there is none yet."""
    trained = [stage for stage in ("mid", "sft", "rl") if stage in ladder]
    if not trained:
        return "the same command without --to"
    python, model = min(os.path.relpath(sys.executable), sys.executable, key=len), f"{run_dir}/{trained[-1]}"
    app = os.path.relpath(ROOT / "space" / "app.py")
    return f"{python} -m modeling_nanochat.chat {model}   (terminal),   {python} {app} {model}   (browser)"


def recipe_and_words(words: list[str]) -> tuple[str, list[str]]:
    """The recipe's name and the rest of the command line, with the recipe's run.yaml as its configuration file."""
    known = sorted(path.parent.name for path in RECIPES.glob("*/run.yaml"))
    usage = f"python recipes/run.py {{{','.join(known)}}} [--from stage] [--to stage] [...]"
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\nRecipes: {', '.join(known)}. {usage}\n")
        parse(RunArguments, args=["--help"])
    if not words or words[0] not in known:
        given = f"{words[0]!r} is not a recipe" if words and not words[0].startswith("-") else "which recipe?"
        raise UserError(f"{given}; {usage}")
    recipe, *rest = words
    if not any(word == "--config" or word.startswith("--config=") for word in rest):
        rest = ["--config", str(RECIPES / recipe / "run.yaml"), *rest]
    return recipe, rest


def check_before(waiting: list[Step]) -> None:
    """Check what the steps to come were given. Imports all of them, which a run with nothing left to do can save."""
    if any(step.name != "report" for step in waiting):
        from recipes.preflight import check_steps

        check = partial(check_steps, waiting)
        check_in_fork(check) if can_fork() else check()


def stage_number(name: str) -> int:
    name = ALIASES.get(name, name)
    if name not in STAGES:
        raise UserError(f"{name!r} is not a stage; there are {', '.join(STAGES)} (or pretrain, midtrain, grpo)")
    return STAGES.index(name)


def parse_overrides(words: list[str]) -> dict[str, list[str]]:
    """`["base.depth=6"]` -> `{"base": ["--depth", "6"]}`; "eval" and "tokenizer_eval" are stages here too."""
    overrides: dict[str, list[str]] = {stage: [] for stage in (*STAGES, "eval", "tokenizer_eval")}
    for word in words:
        key, equals, value = word.partition("=")
        stage, dot, name = key.partition(".")
        stage = ALIASES.get(stage, stage)
        if not equals or not dot or not name or stage not in overrides:
            raise UserError(f"--set {word}: expected stage.key=value, with a stage of {', '.join(overrides)}")
        overrides[stage] += [f"--{name}", *override_values(word, value)]
    return overrides


def override_values(word: str, value: str) -> list[str]:
    """`a,b` -> `["a", "b"]`; what begins with a bracket or a quote is YAML: `["a, b"]` and `"a, b"` -> `["a, b"]`."""
    if not value.startswith(("[", '"', "'")):
        return value.split(",")
    try:
        values = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {word}: not valid YAML ({first_line(error)}); write ['one, with a comma', 'two']") from error
    values = values if isinstance(values, list) else [values]
    if not values or any(isinstance(value, list | dict) or value is None for value in values):
        raise UserError(f"--set {word}: expected a list of values; write ['one, with a comma', 'two']")
    return [str(value) for value in values]


def steps(stage: str, recipe: Path, args: RunArguments, overrides: dict[str, list[str]]) -> list[Step]:
    """The commands of one stage; none where everything that it would make was given."""
    run, more = args.run_dir, overrides[stage]
    if stage == "data":
        return [data_step(recipe, run, [*examples(args), *more])] if generates(args) else []
    if stage == "report":
        return [Step("report", script("evals/report.py"), None, ["--run_dir", run])]
    output = ["--output_dir", f"{run}/{stage}"]
    if stage == "tokenizer":
        arguments = ["--train_files", *files(args, "pretrain_files", recipe), *output, *more]
        train = Step("tokenizer", script("tokenizer_train/train.py"), recipe / "tokenizer.yaml", arguments)
        return [train, tokenizer_evaluation_step(recipe, args, overrides["tokenizer_eval"])]
    train = Step(
        stage,
        launcher(args.accelerate_config) + script(f"recipes/{SCRIPTS[stage]}.py")[1:],
        recipe / f"{SCRIPTS[stage]}.yaml",
        [*inputs(stage, args, recipe), *(examples(args) if stage != "base" else []), *output, *more],
    )
    return [train, evaluation_step(stage, recipe, args, overrides["eval"])]


def examples(args: RunArguments) -> list[str]:
    return ["--examples", *args.examples] if args.examples else []


def generates(args: RunArguments) -> bool:
    return any(getattr(args, name) is None for name in GENERATED)


def data_step(recipe: Path, run: str, more: list[str]) -> Step:
    """Raises [`UserError`] where the recipe has no generated world and files are missing."""
    if not (recipe / "world.py").exists():
        raise UserError(f"recipe {recipe.name} generates no data; give {', '.join('--' + name for name in GENERATED)}")
    return Step("data", script(recipe / "world.py"), recipe / "world.yaml", ["--output_dir", f"{run}/data", *more])


def script(path: str | Path) -> list[str]:
    return [sys.executable, os.path.relpath(ROOT / path)]


def launcher(config: str) -> list[str]:
    """`accelerate launch` of this very Python; a shipped configuration is found from any folder.

    For one process on the CPU it would do no more than set variables, after two seconds of imports: `env` does it too.
    """
    found = next((path for path in (Path(config), ROOT / config) if path.is_file()), None)
    if found is None:
        raise UserError(f"accelerate_config {config}: no such file; accelerate_configs/ holds the shipped ones")
    settings = read_yaml(found)
    threads = threads_on_cpu(settings)
    if settings.get("use_cpu") and settings.items() <= ONE_CPU_PROCESS.items():
        return ["env", "ACCELERATE_USE_CPU=true", *(f"OMP_NUM_THREADS={count}" for count in threads), sys.executable]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command += ["--config_file", os.path.relpath(found)]
    return command + [word for count in threads for word in ("--num_cpu_threads_per_process", str(count))]


def threads_on_cpu(accelerate_config: dict) -> list[int]:
    """The number of threads that `accelerate launch` takes on a CPU; not given it takes the same, with a warning. Else none."""
    if not accelerate_config.get("use_cpu") or "OMP_NUM_THREADS" in os.environ:
        return []
    cores, processes = psutil.cpu_count(logical=False) or 1, accelerate_config.get("num_processes") or 1
    return [max(1, cores // processes)]


def inputs(stage: str, args: RunArguments, recipe: Path) -> list[str]:
    """The model and files that a training stage reads."""
    if stage == "base":
        text = ["--train_files", *files(args, "pretrain_files", recipe), "--val_files", *files(args, "val_files", recipe)]
        return ["--tokenizer", f"{args.run_dir}/tokenizer", *text]
    model = ["--model_name_or_path", f"{args.run_dir}/{PREDECESSOR[stage]}"]
    replay = ["--replay_files", *files(args, "pretrain_files", recipe)] if stage == "mid" else []
    return [*model, "--train_files", *files(args, f"{SCRIPTS[stage]}_files", recipe), *replay]


def tokenizer_evaluation_step(recipe: Path, args: RunArguments, more: list[str]) -> Step:
    arguments = ["--tokenizer", f"{args.run_dir}/tokenizer", "--output_file", f"{args.run_dir}/results/tokenizer.json"]
    arguments += ["--train_files", *files(args, "pretrain_files", recipe), "--val_files", *files(args, "val_files", recipe)]
    return Step("tokenizer.eval", script("tokenizer_train/evaluate.py"), recipe / "tokenizer_eval.yaml", [*arguments, *more])


def evaluation_step(stage: str, recipe: Path, args: RunArguments, more: list[str]) -> Step:
    arguments = ["--model_name_or_path", f"{args.run_dir}/{stage}", "--output_file", f"{args.run_dir}/results/{stage}.json"]
    arguments += ["--eval_files", *files(args, "eval_files", recipe), "--text_files", *files(args, "val_files", recipe)]
    base = ["--base_model", "true"] if stage == "base" else []
    return Step(f"{stage}.eval", script("evals/evaluate_model.py"), recipe / "eval.yaml", [*arguments, *base, *more])


def files(args: RunArguments, name: str, recipe: Path) -> list[str]:
    """Those given, or those that the recipe's YAML names, in this run's folder in place of the recipe's."""
    if (given := getattr(args, name)) is not None:
        return given
    file, key = GENERATED[name]
    entries, usual = read_yaml(recipe / file).get(key), read_yaml(recipe / "run.yaml")["run_dir"]
    if not entries:
        raise UserError(f"{recipe / file}: names no {key}; give --{name}")
    return [entry.replace(f"{usual}/data/", f"{args.run_dir}/data/", 1) for entry in entries]


def make_plan(ladder: dict[str, list[Step]], run_dir: Path, first: int | None) -> list[tuple[Step, bool, bool]]:
    """Each step, whether it is to be run, and whether it was asked for by `--from`. Nothing is changed yet.

    Args:
        ladder: The steps of each stage, in order.
        first: Number of the stage that `--from` names.

    Raises:
        UserError: A YAML is missing, a step was finished with other settings, or its folder is not this run's.
    """
    plan, stale = [], False
    for stage, of_stage in ladder.items():
        for step in of_stage:
            wanted = step.fingerprint(run_dir)
            redo = first is not None and STAGES.index(stage) >= first
            todo = redo or is_to_do(step, run_dir, wanted, stale, keep=first is not None)
            todo = todo or (stage == "report" and report_is_old(plan, run_dir))
            stale = stale or (todo and step.makes_folder)  # all that follows was made from what it replaces
            plan.append((step, todo, redo))
    return plan


def is_to_do(step: Step, run_dir: Path, wanted: dict, stale: bool, keep: bool) -> bool:
    """Whether a step that was not asked for is to be run; `keep` folders that are not this run's."""
    if step.makes_folder and step.result.exists() and not is_own(step.name, run_dir):
        if keep:
            return False
        raise UserError(
            f"{step.result} is there, but not made by this run; give --from {step.name} to replace it, --from "
            f"{STAGES[STAGES.index(step.name) + 1]} to go on from it as it is, or another --run_dir"
        )
    if stale or not is_finished(step, run_dir):
        refuse_other_settings(step, run_dir, wanted)
        return True
    change = difference(read_marker(step, run_dir), wanted)
    if change and not step.is_measurement:  # that is cheap, a model may be dear
        raise UserError(
            f"{step.name} was finished with other settings ({change}); give --from {step.name} to redo it and what "
            "follows, or another --run_dir"
        )
    if change:
        print(f"{step.name}: settings changed ({change})")
    return bool(change)


def report_is_old(plan: list[tuple[Step, bool, bool]], run_dir: Path) -> bool:
    """Whether anything that the report shows is to be made or was made since."""
    written = (run_dir / "report.md").stat().st_mtime_ns
    sources = [path for kind in ("stages", "results", "finished") for path in (run_dir / kind).glob("*.json")]
    newer = [path for path in sources if path.stem != "report" and path.stat().st_mtime_ns > written]
    return bool(newer) or any(todo for _, todo, _ in plan)


def refuse_other_settings(step: Step, run_dir: Path, wanted: dict) -> None:
    """Raise [`UserError`] where TRL's trainers would go on from a checkpoint of other settings; the loop's own check it."""
    if step.name not in ("sft", "rl") or not has_checkpoints(step.name, run_dir):
        return
    before = read_marker(step, run_dir)
    if change := before and difference(before, wanted):
        raise UserError(
            f"{step.name} has checkpoints of other settings ({change}); give the same, or --from {step.name} to start it anew"
        )


def has_checkpoints(name: str, run_dir: Path) -> bool:
    return name in RESUME and any((run_dir / "checkpoints" / name).glob("*-*"))


def is_own(name: str, run_dir: Path) -> bool:
    """Whether this run has begun the step of that name at some time."""
    return any(marker(name, run_dir, kind).exists() for kind in ("started", "finished"))


def is_finished(step: Step, run_dir: Path) -> bool:
    """Whether what the step leaves is there, and the run saw its end, or was killed before but the step wrote its record."""
    ended = marker(step.name, run_dir, "finished").exists() or (step.record is not None and step.record.exists())
    return ended and bool(read_marker(step, run_dir)) and (step.result is None or step.result.exists())


def marker(name: str, run_dir: Path, kind: str) -> Path:
    return run_dir / kind / f"{name}.json"


def read_marker(step: Step, run_dir: Path) -> dict:
    """The settings that the step was last begun with; empty if there are none, or none to be read: it is done again."""
    for kind in ("started", "finished"):
        try:
            return json.loads(marker(step.name, run_dir, kind).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            break
    return {}


def run_step(step: Step, run_dir: Path, redo: bool, lock: int | None = None, verbose: bool = False) -> None:
    """Run a step; while it runs, nothing that follows from its earlier result counts as finished.

    Raises:
        UserError: The command failed or was stopped.
    """
    wanted, again = step.fingerprint(run_dir), "the same command without --from" if redo else "the same command"
    forget(step, run_dir)
    if step.record is not None:
        step.record.unlink(missing_ok=True)
    write_json(marker(step.name, run_dir, "started"), wanted)
    # a folder of that name is this run's, unfinished or unwanted; the world replaces only itself
    overwrite = ["--overwrite_output_dir", "true"] if step.makes_folder and step.name != "data" else []
    resume = [RESUME[step.name], "auto"] if has_checkpoints(step.name, run_dir) and not redo else []
    command = [*step.command, *overwrite, *resume]
    if verbose:
        print(shown(command), flush=True)
    started = time.perf_counter()
    environment = {**stage_environment(verbose), "PYTHONPATH": search_path()}
    code = call(command, environment, again, lock, silent=step.is_measurement and not verbose)
    if code or not (step.record is None or step.record.exists()):
        more = "" if verbose else "; --verbose true shows more"
        how = f"stopped with exit code {code}; fix the error above, then" if code else "was stopped before its end;"
        resumes = has_checkpoints(step.name, run_dir)
        then = f"goes on from its checkpoint, --from {step.name} starts anew" if resumes else "goes on from there"
        raise UserError(f"{step.name} {how} {again} {then}{more}")
    seconds = round(time.perf_counter() - started, 1)
    cost = {"seconds": seconds, "peak_memory_mib_so_far": peak_memory_mib()}
    write_json(marker(step.name, run_dir, "finished"), wanted | cost)
    marker(step.name, run_dir, "started").unlink()


def search_path() -> str:
    """Where a stage finds the project's packages though they are not installed."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def peak_memory_mib() -> int:
    """Of the largest process among all that this run has started and seen end."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit


def shown(command: list[str]) -> str:
    """The command as one would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(words).replace("python -m accelerate.commands.accelerate_cli", "accelerate", 1)


def difference(finished: dict, wanted: dict) -> str:
    """`base.depth: 4 is now 6` for the first settings that differ; empty if none does."""
    changes = []
    for part in ("config", "arguments"):
        before, after = finished[part], wanted[part]
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        changes += [f"{key}: {plain(before.get(key))} is now {plain(after.get(key))}" for key in changed]
    return ", ".join(changes[:3])


def plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "unset" if value is None else str(value)


def forget(step: Step, run_dir: Path) -> None:
    """Let neither the step nor what this run made from its earlier result count as finished."""
    names = [step.name]
    if step.makes_folder:
        names += [name for stage in STAGES[STAGES.index(step.name) :] for name in (stage, f"{stage}.eval")]
    for name in names:
        if not is_own(name, run_dir):
            continue
        if marker(name, run_dir, "finished").exists():  # what it left is still the run's own
            (run_dir / "started").mkdir(exist_ok=True)
            marker(name, run_dir, "finished").replace(marker(name, run_dir, "started"))
        stage, _, evaluation = name.partition(".")
        marker(stage, run_dir, "results" if evaluation else "stages").unlink(missing_ok=True)
        if not evaluation and name != step.name:
            (run_dir / "logs" / f"{stage}.jsonl").unlink(missing_ok=True)
            shutil.rmtree(run_dir / "checkpoints" / stage, ignore_errors=True)


@contextmanager
def only_run(run_dir: Path) -> Iterator[int]:
    """Hold the run folder: two runs in it would overwrite each other's stages. Gives the lock's descriptor."""
    import fcntl

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written ({error.strerror}); give another --run_dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{run_dir} is in use by another run; wait for it or give another --run_dir") from error
        yield lock.fileno()


if __name__ == "__main__":
    exit_on_user_error(main)
