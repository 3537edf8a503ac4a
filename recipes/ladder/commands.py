"""The commands that make up each stage of the ladder."""

import os
import sys
from pathlib import Path

import psutil

from modeling_nanochat.chat.stages import STAGES, Stage
from modeling_nanochat.errors import UserError

from .arguments import RunArguments
from .step import Step, read_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
# The settings of `accelerate_configs/cpu.yaml`; none of them needs a launcher.
ONE_CPU_PROCESS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "num_machines": 1,
    "num_processes": 1,
    "machine_rank": 0,
    "mixed_precision": "no",
    "use_cpu": True,
}
# File arguments that a generated world provides, with the recipe's YAML and key that name the default.
GENERATED = {
    "pretrain_files": ("pretrain.yaml", "train_files"),
    "val_files": ("pretrain.yaml", "val_files"),
    "midtrain_files": ("midtrain.yaml", "train_files"),
    "sft_files": ("sft.yaml", "train_files"),
    "grpo_files": ("grpo.yaml", "train_files"),
    "eval_tasks": ("eval.yaml", "tasks"),
}


def steps(stage: str, recipe: Path, args: RunArguments, overrides: dict[str, list[str]]) -> list[Step]:
    """The commands of one stage; none for `data` if all its files were given."""
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
    row = STAGES[stage]
    train = Step(
        stage,
        launcher(args.accelerate_config) + script(f"recipes/{row.script}.py")[1:],
        recipe / f"{row.script}.yaml",
        [*inputs(row, args, recipe), *(examples(args) if row.chats else []), *output, *more],
    )
    return [train, evaluation_step(stage, recipe, args, overrides["eval"])]


def examples(args: RunArguments) -> list[str]:
    return ["--examples", *args.examples] if args.examples else []


def generates(args: RunArguments) -> bool:
    return any(getattr(args, name) is None for name in GENERATED)


def data_step(recipe: Path, run: str, more: list[str]) -> Step:
    """The step that generates the world; raises [`UserError`] if the recipe has none."""
    if not (recipe / "world.py").exists():
        raise UserError(f"recipe {recipe.name} generates no data; give {', '.join('--' + name for name in GENERATED)}")
    return Step("data", script(recipe / "world.py"), recipe / "world.yaml", ["--output_dir", f"{run}/data", *more])


def script(path: str | Path) -> list[str]:
    return [sys.executable, os.path.relpath(ROOT / path)]


def launcher(config: str) -> list[str]:
    """The launcher's command, with this Python; shipped configurations are found from any folder.

    For one CPU process `accelerate launch` only sets variables, after two seconds of imports; `env` replaces it there.
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
    """`[threads per process]` on a CPU, the default of `accelerate launch`, which warns if it is unset; else `[]`."""
    if not accelerate_config.get("use_cpu") or "OMP_NUM_THREADS" in os.environ:
        return []
    cores, processes = psutil.cpu_count(logical=False) or 1, accelerate_config.get("num_processes") or 1
    return [max(1, cores // processes)]


def inputs(stage: Stage, args: RunArguments, recipe: Path) -> list[str]:
    """The arguments that name a training stage's model and files."""
    if stage.predecessor is None:
        return ["--tokenizer", f"{args.run_dir}/tokenizer", *text_files(args, recipe)]
    model = ["--model_name_or_path", f"{args.run_dir}/{stage.predecessor}"]
    replay = ["--replay_files", *files(args, "pretrain_files", recipe)] if stage.name == "mid" else []
    return [*model, "--train_files", *files(args, f"{stage.script}_files", recipe), *replay]


def text_files(args: RunArguments, recipe: Path) -> list[str]:
    return ["--train_files", *files(args, "pretrain_files", recipe), "--val_files", *files(args, "val_files", recipe)]


def tokenizer_evaluation_step(recipe: Path, args: RunArguments, more: list[str]) -> Step:
    arguments = ["--tokenizer", f"{args.run_dir}/tokenizer", "--output_file", f"{args.run_dir}/results/tokenizer.json"]
    arguments += [*text_files(args, recipe), *more]
    return Step("tokenizer.eval", script("tokenizer_train/evaluate.py"), recipe / "tokenizer_eval.yaml", arguments)


def evaluation_step(stage: str, recipe: Path, args: RunArguments, more: list[str]) -> Step:
    output_file = f"{args.run_dir}/results/{stage}.json"
    arguments = ["--model_name_or_path", f"{args.run_dir}/{stage}", "--output_file", output_file]
    arguments += ["--tasks", *files(args, "eval_tasks", recipe)]
    arguments += ["--text_files", *files(args, "val_files", recipe)]
    base = [] if STAGES[stage].chats else ["--base_model", "true"]
    return Step(f"{stage}.eval", script("evals/evaluate_model.py"), recipe / "eval.yaml", [*arguments, *base, *more])


def files(args: RunArguments, name: str, recipe: Path) -> list[str]:
    """The files given, or the defaults in the recipe's YAML, with its run folder replaced by this run's."""
    if (given := getattr(args, name)) is not None:
        return given
    file, key = GENERATED[name]
    entries, default_run_dir = read_yaml(recipe / file).get(key), read_yaml(recipe / "run.yaml")["run_dir"]
    if not entries:
        raise UserError(f"{recipe / file}: names no {key}; give --{name}")
    return [entry.replace(f"{default_run_dir}/data/", f"{args.run_dir}/data/", 1) for entry in entries]
