"""Arguments of a ladder run: its stages, its files, and settings of single stages."""

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from modeling_nanochat.chat.stages import SCRIPTS, STAGES
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line

LADDER = ("data", "tokenizer", *STAGES, "report")


@dataclass
class RunArguments:
    """One run of a recipe. Files that are given replace those that the recipe's YAMLs name."""

    run_dir: str = field(metadata={"help": "Folder for everything the run writes."})
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "File for `accelerate launch --config_file`; default: one process, on the device there is."},
    )
    pretrain_files: list[str] | None = field(
        default=None, metadata={"help": "Raw text: parquet, JSON(L), .txt, folders, Hub ids."}
    )
    val_files: list[str] | None = field(default=None, metadata={"help": "Raw text for bits per byte."})
    midtrain_files: list[str] | None = field(
        default=None, metadata={"help": "Conversations for midtraining: parquet, JSON(L), Hub ids."}
    )
    sft_files: list[str] | None = field(default=None, metadata={"help": "Conversations for SFT, same formats."})
    grpo_files: list[str] | None = field(
        default=None, metadata={"help": "Problems like GSM8K: files, folders or Hub ids."}
    )
    eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Evaluation tasks: published ones by name, others as name=source."}
    )
    examples: list[str] = field(
        default_factory=list,
        metadata={"help": "Example questions for the chat and the page; written into the model folders."},
    )
    verbose: bool = field(
        default=False, metadata={"help": "Print commands, all settings, evaluations, tables and progress bars."}
    )
    next: str | None = field(
        default=None, metadata={"help": "Commands suggested in the last line; default: those for chat and page."}
    )
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Stage settings, each stage.key=value, e.g. base.depth=6. Commas separate the values of a list; "
            "write values that contain a comma as YAML: 'base.sample_prompts=[\"Once upon a time, there\"]'."
        },
    )
    from_stage: str | None = field(
        default=None,
        metadata={
            "aliases": ["--from"],
            "help": f"Redo this and all later stages, keeping earlier ones: {', '.join(LADDER)}.",
        },
    )
    to_stage: str = field(default="report", metadata={"aliases": ["--to"], "help": "Stop after this stage."})
    max_hours: float | None = field(
        default=None, metadata={"help": "After these hours the running stage saves and the run ends, to be continued."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print steps, tokens, memory, disk, hours and dollars of each stage; run and write nothing."
        },
    )
    hardware: str | None = field(
        default=None,
        metadata={"help": "What to plan for with --dry_run: 8xh100, 1x4090, mps, cpu; default: this machine."},
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: `max_hours` is out of range, or `hardware` has no effect.
        """
        if self.max_hours is not None and not 0 < self.max_hours < float("inf"):
            raise UserError(f"max_hours: is {self.max_hours:g}, must be a positive number; correct it")
        if self.hardware and not self.dry_run:
            raise UserError("hardware has no effect without --dry_run true; add that, or leave it out")


def stage_number(name: str) -> int:
    stage = folder_name(name)
    if stage not in LADDER:
        aliases = ", ".join(script for script in SCRIPTS if script not in LADDER)
        raise UserError(f"{name!r} is not a stage; there are {', '.join(LADDER)} (or {aliases})")
    return LADDER.index(stage)


def folder_name(stage: str) -> str:
    """The name of a stage that may be given by its script's: `pretrain` -> `base`."""
    return SCRIPTS[stage].name if stage in SCRIPTS else stage


def parse_overrides(words: list[str]) -> dict[str, list[str]]:
    """`["base.depth=6"]` -> `{"base": ["--depth", "6"]}`; also accepts the stages "eval" and "tokenizer_eval"."""
    overrides: dict[str, list[str]] = {stage: [] for stage in (*LADDER, "eval", "tokenizer_eval")}
    for word in words:
        key, equals, value = word.partition("=")
        stage, dot, name = key.partition(".")
        stage = folder_name(stage)
        if not equals or not dot or not name or stage not in overrides:
            raise UserError(f"--set {word}: expected stage.key=value, where stage is one of {', '.join(overrides)}")
        overrides[stage] += [f"--{name}", *override_values(word, value)]
    return overrides


def override_values(word: str, value: str) -> list[str]:
    """`a,b` -> `["a", "b"]`; a leading bracket or quote means YAML: `["a, b"]` and `"a, b"` -> `["a, b"]`."""
    if not value.startswith(("[", '"', "'")):
        return value.split(",")
    try:
        values = yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = first_line(error)
        raise UserError(f"--set {word}: not valid YAML ({reason}); write ['one, with a comma', 'two']") from error
    values = values if isinstance(values, list) else [values]
    if not values or any(isinstance(value, list) or value is None for value in values):
        raise UserError(f"--set {word}: expected a list of values; write ['one, with a comma', 'two']")
    return [word_of(value) for value in values]


def word_of(value: Any) -> str:
    """A YAML value as a word of a command line; mappings become JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
