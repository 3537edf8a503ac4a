"""The commands that make up each stage of the ladder."""

import os
import sys
from pathlib import Path

from modeling_nanochat.chat.stages import STAGES
from modeling_nanochat.errors import UserError

from .arguments import RunArguments, word_of
from .launch import ROOT, launch_file, launcher, process_count
from .step import Step, read_yaml, relocated

RECIPES = ROOT / "recipes"
# File arguments of a run, with the YAML of the stage that reads them.
FILES = {
    "pretrain_files": "pretrain.yaml",
    "val_files": "pretrain.yaml",
    "midtrain_files": "midtrain.yaml",
    "sft_files": "sft.yaml",
    "grpo_files": "grpo.yaml",
    "eval_tasks": "eval.yaml",
}

Settings = dict[str, list[str] | None]  # what the run sets; None leaves a key to the YAML


def steps(stage: str, recipe: Path, args: RunArguments, overrides: dict[str, list[str]]) -> list[Step]:
    """The commands of one stage; none for a training stage without a YAML, or for `data` if all files were given.

    Raises:
        UserError: A YAML that every recipe needs is missing or broken, or files are given for a stage that is missing.
    """
    run, more = args.run_dir, overrides[stage]
    if stage == "data":
        return data_steps(recipe, args, more)
    if stage == "report":
        return [Step("report", script("evals/report.py"), None, ["--run_dir", run])]
    output: Settings = {"output_dir": [f"{run}/{stage}"]}
    if stage == "tokenizer":
        program, settings = script("tokenizer_train/train.py"), output | {"train_files": args.pretrain_files}
        train = make_step("tokenizer", program, recipe / "tokenizer.yaml", args, settings, more)
        return [train, *tokenizer_evaluation(recipe, args, overrides["tokenizer_eval"])]
    config = recipe / f"{STAGES[stage].script}.yaml"
    if stage != "base" and not config.exists():
        return []
    program = launcher(args.accelerate_config) + script(f"recipes/{config.stem}.py")[1:]
    settings = text_settings(args) if stage == "base" else conversation_settings(stage, config, args)
    train = make_step(stage, program, config, args, settings | output, more)
    return [train, evaluation_step(stage, recipe, args, overrides["eval"])]


def text_settings(args: RunArguments) -> Settings:
    return {
        "tokenizer": [f"{args.run_dir}/tokenizer"],
        "train_files": args.pretrain_files,
        "val_files": args.val_files,
    }


def conversation_settings(stage: str, config: Path, args: RunArguments) -> Settings:
    """The model, files and examples of a stage after pretraining, which continues the last stage before it."""
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    start = next(name for name in reversed(earlier) if (config.parent / f"{STAGES[name].script}.yaml").exists())
    content, files = read_yaml(config), getattr(args, f"{config.stem}_files")
    return {
        "model_name_or_path": [f"{args.run_dir}/{start}"],
        ("mixture" if "mixture" in content else "train_files"): files,
        "replay_files": args.pretrain_files if "replay_files" in content else None,
        "examples": args.examples or None,
    }


def make_step(
    name: str, program: list[str], config: Path, args: RunArguments, settings: Settings, more: list[str]
) -> Step:
    """A step with its YAML's paths moved to this run's folder; `more` are words that override all others."""
    default = read_yaml(config.parent / "run.yaml").get("run_dir", args.run_dir)
    arguments: dict[str, list[str]] = {}
    for key, value in read_yaml(config).items():
        if (moved := relocated(value, default, args.run_dir)) != value:
            arguments[key] = [word_of(item) for item in (moved if isinstance(moved, list) else [moved])]
    arguments |= {key: words for key, words in settings.items() if words is not None}
    flags = [word for key, words in arguments.items() for word in (f"--{key}", *words)]
    return Step(name, program, config, [*flags, *more])


def data_steps(recipe: Path, args: RunArguments, more: list[str]) -> list[Step]:
    """The step that generates or fetches the data; none if all files that the recipe's stages read were given."""
    read = {name: (recipe / config).exists() for name, config in FILES.items()}
    given = {name for name in FILES if getattr(args, name) is not None}
    if surplus := [name for name in given if not read[name]]:
        raise UserError(f"{surplus[0]}: recipe {recipe.name} has no {FILES[surplus[0]]}; leave them out")
    missing = [name for name in FILES if read[name] and name not in given]
    if not missing:
        return []
    output: Settings = {"output_dir": [f"{args.run_dir}/data"]}
    if (recipe / "world.py").exists():
        settings = output | {"examples": args.examples or None}
        return [make_step("data", script(recipe / "world.py"), recipe / "world.yaml", args, settings, more)]
    if not (recipe / "data.yaml").exists():
        raise UserError(f"recipe {recipe.name} has no data; give {', '.join('--' + name for name in missing)}")
    settings = output | fetched(recipe / "data.yaml", given)
    return [make_step("data", script("recipes/fetch.py"), recipe / "data.yaml", args, settings, more)]


def fetched(config: Path, given: set[str]) -> Settings:
    """Settings of `fetch.py` that leave out what the files given replace."""
    replaced = {FILES[name] for name in given - {"pretrain_files", "val_files"}}
    named = read_yaml(config).get("configs") or []
    kept = [name for name in named if Path(name).name not in replaced] or [str(config.parent / "pretrain.yaml")]
    shards = {"train_shards": "pretrain_files", "val_shards": "val_files"}
    settings: Settings = {key: ["0"] for key, name in shards.items() if name in given}
    return settings | ({"configs": kept} if replaced else {})


def script(path: str | Path) -> list[str]:
    return [sys.executable, os.path.relpath(ROOT / path)]


def tokenizer_evaluation(recipe: Path, args: RunArguments, more: list[str]) -> list[Step]:
    """The comparison of the tokenizer with others; none without its YAML."""
    if not (config := recipe / "tokenizer_eval.yaml").exists():
        return []
    settings = text_settings(args) | {"output_file": [f"{args.run_dir}/results/tokenizer.json"]}
    return [make_step("tokenizer.eval", script("tokenizer_train/evaluate.py"), config, args, settings, more)]


def evaluation_step(stage: str, recipe: Path, args: RunArguments, more: list[str]) -> Step:
    settings = {
        "model_name_or_path": [f"{args.run_dir}/{stage}"],
        "output_file": [f"{args.run_dir}/results/{stage}.json"],
        "tasks": args.eval_tasks,
        "text_files": args.val_files,
        "base_model": None if STAGES[stage].chats else ["true"],
    }
    program = script("evals/evaluate_model.py")
    if args.accelerate_config and process_count(launch_file(args.accelerate_config)[1]) > 1:
        program = [*launcher(args.accelerate_config), *program[1:]]
    return make_step(f"{stage}.eval", program, recipe / "eval.yaml", args, settings, more)
