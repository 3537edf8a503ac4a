"""The whole ladder: data, tokenizer, pretrain, midtrain, SFT, GRPO, evaluation after each, report card.

    python recipes/run.py pocket

    python recipes/run.py pocket --from sft                      # redo from there
    python recipes/run.py pocket --config my_data.yaml           # your files in place of the generated world

Notable features:
- every stage is a process of its own, the same command that you would type
- what is finished is found and skipped, so a run that was stopped goes on where it was
- `--set stage.key=value` reaches any key of any stage
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data", "tokenizer", "base", "mid", "sft", "rl", "report")
ALIASES = {"pretrain": "base", "midtrain": "mid", "grpo": "rl"}
TRAINING = {"base": "pretrain", "mid": "midtrain", "sft": "sft", "rl": "grpo"}
PREDECESSOR = {"mid": "base", "sft": "mid", "rl": "sft"}


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
    from_stage: str = field(default="data", metadata={"help": "--from: redo this stage and the later ones."})
    to_stage: str = field(default="report", metadata={"help": "--to: stop after this stage."})


def main() -> None:
    recipe, words = recipe_and_words(sys.argv[1:])
    (args,) = parse(RunArguments, args=words)
    redo_from = stage_number(args.from_stage) if "--from_stage" in words else len(STAGES)
    for stage in STAGES[: stage_number(args.to_stage) + 1]:
        run_stage(stage, recipe, args, redo=STAGES.index(stage) >= redo_from)


def recipe_and_words(words: list[str]) -> tuple[str, list[str]]:
    """The recipe's name and the rest of the command line, with the recipe's run.yaml as its configuration file."""
    known = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/run.yaml"))
    if not words or words[0] not in known:
        given = f"{words[0]!r} is not a recipe" if words and not words[0].startswith("-") else "which recipe?"
        raise UserError(f"{given}; python recipes/run.py {{{','.join(known)}}} [--from stage] [--to stage] [...]")
    renamed = {"--from": "--from_stage", "--to": "--to_stage"}
    rest = [renamed.get(word, word) for word in words[1:]]
    if not any(word == "--config" or word.startswith("--config=") for word in rest):
        rest = ["--config", str(ROOT / "recipes" / words[0] / "run.yaml"), *rest]
    return words[0], rest


def stage_number(name: str) -> int:
    name = ALIASES.get(name, name)
    if name not in STAGES:
        raise UserError(f"{name!r} is not a stage; there are {', '.join(STAGES)} (or pretrain, midtrain, grpo)")
    return STAGES.index(name)
