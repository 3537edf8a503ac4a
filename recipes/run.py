"""The whole ladder: data, tokenizer, pretrain, midtrain, SFT, GRPO, evaluation after each, report card.

    python recipes/run.py pocket

    python recipes/run.py pocket --from sft                      # redo from there
    python recipes/run.py pocket --config my_data.yaml           # your files in place of the generated world

Notable features:
- every stage is a process of its own, the same command that you would type
- what is finished is found and skipped, so a run that was stopped goes on where it was
- `--set stage.key=value` reaches any key of any stage
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from evals.records import write_json
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
STAGES = ("data", "tokenizer", "base", "mid", "sft", "rl", "report")
ALIASES = {"pretrain": "base", "midtrain": "mid", "grpo": "rl"}
SCRIPTS = {"base": "pretrain", "mid": "midtrain", "sft": "sft", "rl": "grpo"}
PREDECESSOR = {"mid": "base", "sft": "mid", "rl": "sft"}
# Where a recipe's generated world puts what was not given.
GENERATED = {
    "pretrain_files": ["data/pretrain/train.parquet"],
    "val_files": ["data/pretrain/val.parquet"],
    "midtrain_files": ["data/conversations/train.jsonl"],
    "sft_files": ["data/sft/train.jsonl"],
    "grpo_files": ["data/problems/train.jsonl"],
    "eval_files": [
        "cloze=data/eval/cloze.jsonl",
        "facts=data/eval/facts.jsonl",
        "multiple_choice=data/eval/multiple_choice.jsonl",
        "problems=data/eval/problems.jsonl",
        "spelling=data/eval/spelling.jsonl",
    ],
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
    set: list[str] = field(
        default_factory=list, metadata={"help": "Settings of stages, each stage.key=value, for instance base.depth=6."}
    )
    from_stage: str | None = field(default=None, metadata={"help": "--from: redo this stage and the later ones."})
    to_stage: str = field(default="report", metadata={"help": "--to: stop after this stage."})


@dataclass
class Step:
    """One command of the ladder: its name in `<run>/finished/`, the script with its launcher, its YAML, its arguments."""

    name: str
    program: list[str]
    config: Path | None
    arguments: list[str]

    @property
    def command(self) -> list[str]:
        config = ["--config", os.path.relpath(self.config)] if self.config else []
        return [*self.program, *config, *self.arguments]

    def fingerprint(self) -> dict:
        """What the step's result depends on, apart from the files it reads."""
        return {"arguments": self.arguments, "config": yaml.safe_load(self.config.read_text()) if self.config else {}}


def main() -> None:
    recipe, words = recipe_and_words(sys.argv[1:])
    (args,) = parse(RunArguments, args=words)
    first = stage_number(args.from_stage) if args.from_stage else len(STAGES)
    last = stage_number(args.to_stage)
    overrides = parse_overrides(args.set)
    started = time.perf_counter()
    with only_run(Path(args.run_dir)):
        for number, stage in enumerate(STAGES[: last + 1]):
            for step in steps(stage, RECIPES / recipe, args, overrides):
                run_step(step, Path(args.run_dir), redo=number >= first)
    print(f"{recipe}: {args.run_dir} is complete up to {STAGES[last]}, {time.perf_counter() - started:.0f} s in this run")
    if STAGES[last] == "report":
        python, model = os.path.relpath(sys.executable), f"{args.run_dir}/rl"
        print(f"Talk to it:  {python} -m modeling_nanochat.chat {model}")
        print(f"in the browser:  {python} space/app.py {model}")


def recipe_and_words(words: list[str]) -> tuple[str, list[str]]:
    """The recipe's name and the rest of the command line, with the recipe's run.yaml as its configuration file."""
    known = sorted(path.parent.name for path in RECIPES.glob("*/run.yaml"))
    if not words or words[0] not in known:
        given = f"{words[0]!r} is not a recipe" if words and not words[0].startswith("-") else "which recipe?"
        raise UserError(f"{given}; python recipes/run.py {{{','.join(known)}}} [--from stage] [--to stage] [...]")
    renamed = {"--from": "--from_stage", "--to": "--to_stage"}
    rest = [renamed.get(word, word) for word in words[1:]]
    if not any(word == "--config" or word.startswith("--config=") for word in rest):
        rest = ["--config", str(RECIPES / words[0] / "run.yaml"), *rest]
    return words[0], rest


def stage_number(name: str) -> int:
    name = ALIASES.get(name, name)
    if name not in STAGES:
        raise UserError(f"{name!r} is not a stage; there are {', '.join(STAGES)} (or pretrain, midtrain, grpo)")
    return STAGES.index(name)


def parse_overrides(words: list[str]) -> dict[str, list[str]]:
    """`["base.depth=6"]` -> `{"base": ["--depth", "6"]}`; "eval" is a stage here too. Lists are separated by commas."""
    overrides: dict[str, list[str]] = {stage: [] for stage in (*STAGES, "eval")}
    for word in words:
        key, equals, value = word.partition("=")
        stage, dot, name = key.partition(".")
        stage = ALIASES.get(stage, stage)
        if not equals or not dot or not name or stage not in overrides:
            raise UserError(f"--set {word}: expected stage.key=value, with a stage of {', '.join(overrides)}")
        overrides[stage] += [f"--{name}", *value.split(",")]
    return overrides


def steps(stage: str, recipe: Path, args: RunArguments, overrides: dict[str, list[str]]) -> list[Step]:
    """The commands of one stage; none where everything that it would make was given."""
    run, more = args.run_dir, overrides[stage]
    if stage == "data":
        return [data_step(recipe, run, more)] if generates(args) else []
    if stage == "report":
        return [Step("report", script("evals/report.py"), None, ["--run_dir", run, "--print_summary", "true"])]
    output = ["--output_dir", f"{run}/{stage}"]
    if stage == "tokenizer":
        arguments = ["--train_files", *files(args, "pretrain_files"), *output, *more]
        return [Step("tokenizer", script("tokenizer_train/train.py"), recipe / "tokenizer.yaml", arguments)]
    train = Step(
        stage,
        launcher(args.accelerate_config) + script(f"recipes/{SCRIPTS[stage]}.py")[1:],
        recipe / f"{SCRIPTS[stage]}.yaml",
        [*inputs(stage, args), *output, *more],
    )
    return [train, evaluation_step(stage, recipe, args, overrides["eval"])]


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
    """`accelerate launch` of this very Python; a shipped configuration is found from any folder."""
    found = next((path for path in (Path(config), ROOT / config) if path.is_file()), None)
    if found is None:
        raise UserError(f"accelerate_config {config}: no such file; accelerate_configs/ holds the shipped ones")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    return [*command, "--config_file", os.path.relpath(found)]


def inputs(stage: str, args: RunArguments) -> list[str]:
    """The model and files that a training stage reads."""
    if stage == "base":
        text = ["--train_files", *files(args, "pretrain_files"), "--val_files", *files(args, "val_files")]
        return ["--tokenizer", f"{args.run_dir}/tokenizer", *text]
    model = ["--model_name_or_path", f"{args.run_dir}/{PREDECESSOR[stage]}"]
    replay = ["--replay_files", *files(args, "pretrain_files")] if stage == "mid" else []
    return [*model, "--train_files", *files(args, f"{SCRIPTS[stage]}_files"), *replay]


def evaluation_step(stage: str, recipe: Path, args: RunArguments, more: list[str]) -> Step:
    arguments = ["--model_name_or_path", f"{args.run_dir}/{stage}", "--output_file", f"{args.run_dir}/results/{stage}.json"]
    arguments += ["--eval_files", *files(args, "eval_files"), "--text_files", *files(args, "val_files")]
    base = ["--base_model", "true"] if stage == "base" else []
    return Step(f"{stage}.eval", script("evals/evaluate_model.py"), recipe / "eval.yaml", [*arguments, *base, *more])


def files(args: RunArguments, name: str) -> list[str]:
    given = getattr(args, name)
    if given is not None:
        return given
    return [entry.replace("data/", f"{args.run_dir}/data/", 1) for entry in GENERATED[name]]


def run_step(step: Step, run_dir: Path, redo: bool) -> None:
    """Run a step unless it is finished; what it makes counts as finished only after this.

    Raises:
        UserError: The command failed, or was finished with other settings.
    """
    marker = run_dir / "finished" / f"{step.name}.json"
    wanted = step.fingerprint()
    if marker.exists() and not redo and step.name != "report":
        check_unchanged(step, json.loads(marker.read_text()), wanted)
        print(f"{step.name}: finished before, skipped")
        return
    marker.unlink(missing_ok=True)
    forget_later(step, run_dir)
    # whatever lies there without a marker is unfinished or unwanted; the world replaces only itself
    overwrite = ["--overwrite_output_dir", "true"] if "--output_dir" in step.arguments and step.name != "data" else []
    print(f"\n=== {step.name}: {shown(step.command)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started = time.perf_counter()
    result = subprocess.run([*step.command, *overwrite], env=environment, check=False)
    if result.returncode:
        raise UserError(f"{step.name} stopped with exit code {result.returncode}; put it right and run the same command again")
    write_json(marker, wanted | {"seconds": round(time.perf_counter() - started, 1)})


def shown(command: list[str]) -> str:
    """The command as one would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return shlex.join(words).replace("python -m accelerate.commands.accelerate_cli", "accelerate", 1)


def check_unchanged(step: Step, finished: dict, wanted: dict) -> None:
    """Raise [`UserError`] if a finished step was asked for anew with other settings: its result may be dear."""
    for part in ("config", "arguments"):
        if finished[part] != wanted[part]:
            change = difference(finished[part], wanted[part])
            raise UserError(
                f"{step.name} was finished with other settings ({change}); give --from {step.name.split('.')[0]} to redo it "
                "and what follows, or another --run_dir"
            )


def difference(before: dict | list, after: dict | list) -> str:
    if isinstance(before, dict):
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return ", ".join(f"{key}: {before.get(key)} is now {after.get(key)}" for key in changed[:3])
    gone, new = [word for word in before if word not in after], [word for word in after if word not in before]
    return f"{' '.join(gone) or 'nothing'} became {' '.join(new) or 'nothing'}"


def forget_later(step: Step, run_dir: Path) -> None:
    """Markers of what was made from this step's earlier result; an evaluation is nobody's input."""
    if step.name.endswith(".eval") or step.name == "report":
        return
    for stage in STAGES[STAGES.index(step.name) :]:
        for name in (stage, f"{stage}.eval"):
            (run_dir / "finished" / f"{name}.json").unlink(missing_ok=True)


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Hold the run folder: two runs in it would overwrite each other's stages."""
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{run_dir} is in use by another run; wait for it or give another --run_dir") from error
        yield


if __name__ == "__main__":
    exit_on_user_error(main)
