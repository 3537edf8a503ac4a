"""Checks of `run.py` before its first step: every pending step must accept its settings and files.

These are the steps' own checks, as far as they need neither a model nor all of the data; of large files only the first
records are read. Outputs the run has yet to create are skipped: models, the tokenizer, the data.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from evals.core.tasks import load_core
from evals.evaluate_model import EvaluateArguments, load_core_tasks, load_tasks
from modeling_nanochat.chat.python_tool import check_sandbox
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError
from modeling_nanochat.hub import find_folder
from modeling_nanochat.loading import check_folder
from modeling_nanochat.text.texts import check_text_files
from recipes.grpo import GRPOArguments, read_problems
from recipes.midtrain import MidtrainArguments, MidtrainLoopArguments
from recipes.pretrain import PretrainArguments, load_tokenizer
from recipes.sft import SFTArguments
from recipes.training.arguments import LoopArguments
from recipes.training.data.bad_rows import BadRows
from recipes.training.data.conversations import read_conversations
from recipes.training.data.mixtures import FIRST_RECORDS, MixtureArguments, check_beginnings, parse_mixture
from recipes.training.stage import OutputArguments
from recipes.training.trl.optimizers import check_given
from recipes.training.trl.rewards import load_reward
from recipes.training.trl.settings import GRPOSettings, SFTSettings, parse_settings
from recipes.training.trl.stage import check_rows

from .launch import check_processes
from .step import Step


class PendingOutputs:
    """Paths that the pending steps will create and that therefore cannot be checked yet."""

    def __init__(self, steps: Sequence[Step]):
        self.results = {step.result for step in steps}
        self.tasks: set[tuple[bool | str, ...]] = set()  # read already, as base and chat models read them

    def __contains__(self, name: str) -> bool:
        paths = Path(name), Path(name.partition(":")[0])  # a folder's split
        return any(parent in self.results for path in paths for parent in (path, *path.parents))

    def existing(self, names: Sequence[str] | None) -> list[str]:
        return [name for name in names or () if name not in self]


def check_steps(steps: Sequence[Step], accelerate_config: str | None) -> None:
    """Check the machine, parse the settings of the steps and read the beginning of their files, as the steps will.

    Skips world and tokenizer, which run first and report errors themselves, and the report, which has no settings.

    Raises:
        UserError: A step, named first, would reject something, or the machine cannot start its processes.
    """
    if any(step.name in CHECKS for step in steps):
        check_processes(accelerate_config)
    pending = PendingOutputs(steps)
    for step in steps:
        stage, _, evaluation = step.name.partition(".")
        if stage in CHECKS:
            check = check_evaluation if evaluation else CHECKS[stage]
            try:
                with warnings.catch_warnings(action="ignore"):  # the step itself repeats them
                    check(step, pending)
            except UserError as error:
                raise UserError(f"{step.name}: {error}") from error


def arguments(step: Step, *dataclass_types: type) -> tuple:
    return parse(*dataclass_types, args=words(step))


def words(step: Step) -> list[str]:
    return ["--config", str(step.config), *step.arguments]


def check_texts(names: Sequence[str] | None, what: str, pending: PendingOutputs) -> None:
    if given := pending.existing(names):
        check_text_files(given, what)


def check_conversations(args: MixtureArguments, pending: PendingOutputs) -> None:
    if given := pending.existing(args.train_files):
        read_conversations(given, first=FIRST_RECORDS, on_bad_row=args.on_bad_row)
    for name in ("mixture", "validation_mixture"):
        sources = parse_mixture(getattr(args, name, None) or [], name)
        check_beginnings(sources, FIRST_RECORDS, pending, args.on_bad_row)


def check_model(name: str, pending: PendingOutputs) -> None:
    if name and name not in pending:
        check_folder(find_folder(name), name)


def check_optimizer(args: SFTArguments | GRPOArguments, given: Collection[str], pending: PendingOutputs) -> None:
    """Refuse settings of the other optimizer, if the ladder itself will have trained the model."""
    if args.model_name_or_path in pending:
        check_given(given, with_muon=not args.use_peft, what="an adapter")


def check_pretraining(step: Step, pending: PendingOutputs) -> None:
    args, _, _ = arguments(step, PretrainArguments, LoopArguments, OutputArguments)
    if args.tokenizer not in pending:
        load_tokenizer(args.tokenizer)
    for name in ("train_files", "val_files"):
        check_texts(getattr(args, name), name, pending)
    if args.core_dir and args.core_dir not in pending:
        load_core(args.core_dir)


def check_midtraining(step: Step, pending: PendingOutputs) -> None:
    args, _, _ = arguments(step, MidtrainArguments, MidtrainLoopArguments, OutputArguments)
    check_model(args.model_name_or_path, pending)
    check_conversations(args, pending)
    check_texts(args.replay_files, "replay_files", pending)


def check_sft(step: Step, pending: PendingOutputs) -> None:
    args, training, given = parse_settings(SFTArguments, SFTSettings, words(step))
    check_model(args.model_name_or_path, pending)
    check_optimizer(args, given, pending)
    check_conversations(args, pending)
    args.load_tasks(training.seed, pending)


def check_grpo(step: Step, pending: PendingOutputs) -> None:
    args, training, given_settings = parse_settings(GRPOArguments, GRPOSettings, words(step))
    check_sandbox()
    check_model(args.model_name_or_path, pending)
    check_optimizer(args, given_settings, pending)
    for name in args.reward_funcs:
        load_reward(name)
    if held_out := pending.existing(args.eval_files):
        read_problems(held_out, BadRows(args.on_bad_row), args.eval_problems, "eval_files")
    mixture = [source.source for source in parse_mixture(args.mixture or [], "mixture") if not source.task]
    if given := pending.existing(mixture):
        read_problems(given, BadRows(args.on_bad_row), FIRST_RECORDS, "mixture")
    if given := pending.existing(args.train_files):
        problems = read_problems(given, BadRows(args.on_bad_row))
        if len(given) == len(args.train_files):
            check_rows(training, len(problems))


def check_evaluation(step: Step, pending: PendingOutputs) -> None:
    (args,) = arguments(step, EvaluateArguments)
    args.check()
    check_texts(args.text_files, "text_files", pending)
    args.tasks = [entry for entry in args.tasks if entry.partition("=")[2] not in pending]
    if (read := (args.base_model, *args.tasks)) in pending.tasks:
        return
    pending.tasks.add(read)
    load_core_tasks(args)
    for task in load_tasks(args):
        task.task.check_grading()


CHECKS: dict[str, Callable[[Step, PendingOutputs], None]] = {
    "base": check_pretraining,
    "mid": check_midtraining,
    "sft": check_sft,
    "rl": check_grpo,
}
