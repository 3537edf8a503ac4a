"""What `run.py` checks before its first step: that every step to come will take its settings and its files.

The checks are those of the steps themselves, as far as they need neither a model nor all of the data; of large files the
first records are read. What the run is still to make is left out: models, the tokenizer, the generated world.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from evals.core.tasks import load_core
from evals.evaluate_model import EvaluateArguments, load_tasks
from modeling_nanochat.chat.python_tool import check_sandbox
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError
from modeling_nanochat.hub import find_folder
from modeling_nanochat.loading import check_folder
from modeling_nanochat.text.sources import check_text_files
from recipes.grpo import GRPOArguments, read_problems
from recipes.midtrain import MidtrainArguments
from recipes.pretrain import PretrainArguments, load_tokenizer
from recipes.sft import SFTArguments
from recipes.training.arguments import LoopArguments
from recipes.training.data.conversations import read_conversations
from recipes.training.stage import OutputArguments
from recipes.training.trl.settings import GRPOSettings, SFTSettings, parse_settings
from recipes.training.trl.stage import check_rows

from .step import Step

FIRST_RECORDS = 100  # of each file of conversations


class ToBeMade:
    """Tells what the steps to come will make, and so cannot be looked at yet."""

    def __init__(self, steps: Sequence[Step]):
        self.results = {step.result for step in steps}

    def __contains__(self, name: str) -> bool:
        return any(path in self.results for path in (Path(name), *Path(name).parents))

    def others(self, names: Sequence[str] | None) -> list[str]:
        return [name for name in names or () if name not in self]


def check_steps(steps: Sequence[Step]) -> None:
    """Read the settings of the steps as they will, and the beginnings of their files.

    World and tokenizer are left out, which come first and tell it themselves, and the report, which has no settings.

    Raises:
        UserError: A step would refuse something; begins with the name of the step.
    """
    to_be_made = ToBeMade(steps)
    for step in steps:
        stage, _, evaluation = step.name.partition(".")
        if stage in CHECKS:
            check = check_evaluation if evaluation else CHECKS[stage]
            try:
                with warnings.catch_warnings(action="ignore"):  # the step itself will say it again
                    check(step, to_be_made)
            except UserError as error:
                raise UserError(f"{step.name}: {error}") from error


def arguments(step: Step, *dataclass_types: type) -> tuple:
    return parse(*dataclass_types, args=words(step))


def words(step: Step) -> list[str]:
    return ["--config", str(step.config), *step.arguments]


def check_texts(names: Sequence[str] | None, what: str, to_be_made: ToBeMade) -> None:
    if given := to_be_made.others(names):
        check_text_files(given, what)


def check_conversations(names: Sequence[str], to_be_made: ToBeMade) -> None:
    if given := to_be_made.others(names):
        read_conversations(given, first=FIRST_RECORDS)


def check_model(name: str, to_be_made: ToBeMade) -> None:
    if name and name not in to_be_made:
        check_folder(find_folder(name), name)


def check_pretraining(step: Step, to_be_made: ToBeMade) -> None:
    args, _, _ = arguments(step, PretrainArguments, LoopArguments, OutputArguments)
    if args.tokenizer not in to_be_made:
        load_tokenizer(args.tokenizer)
    for name in ("train_files", "val_files"):
        check_texts(getattr(args, name), name, to_be_made)
    if args.core_dir:
        load_core(args.core_dir)


def check_midtraining(step: Step, to_be_made: ToBeMade) -> None:
    args, _, _ = arguments(step, MidtrainArguments, LoopArguments, OutputArguments)
    check_model(args.model_name_or_path, to_be_made)
    check_conversations(args.train_files, to_be_made)
    check_texts(args.replay_files, "replay_files", to_be_made)


def check_sft(step: Step, to_be_made: ToBeMade) -> None:
    args, _, _ = parse_settings(SFTArguments, SFTSettings, words(step))
    check_model(args.model_name_or_path, to_be_made)
    check_conversations(args.train_files, to_be_made)


def check_grpo(step: Step, to_be_made: ToBeMade) -> None:
    args, training, _ = parse_settings(GRPOArguments, GRPOSettings, words(step))
    check_sandbox()
    check_model(args.model_name_or_path, to_be_made)
    if given := to_be_made.others(args.train_files):
        problems = read_problems(given)
        if len(given) == len(args.train_files):
            check_rows(training, len(problems))


def check_evaluation(step: Step, to_be_made: ToBeMade) -> None:
    (args,) = arguments(step, EvaluateArguments)
    args.check()
    check_texts(args.text_files, "text_files", to_be_made)
    if args.core_dir:
        load_core(args.core_dir)
    args.eval_files = [entry for entry in args.eval_files if entry.partition("=")[2] not in to_be_made]
    load_tasks(args)


CHECKS: dict[str, Callable[[Step, ToBeMade], None]] = {
    "base": check_pretraining,
    "mid": check_midtraining,
    "sft": check_sft,
    "rl": check_grpo,
}
