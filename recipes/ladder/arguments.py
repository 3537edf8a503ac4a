"""What a run of the ladder is told: its stages by name, its files, and settings of single stages."""

from dataclasses import dataclass, field

import yaml

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line

STAGES = ("data", "tokenizer", "base", "mid", "sft", "rl", "report")
ALIASES = {"pretrain": "base", "midtrain": "mid", "grpo": "rl"}


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
