"""Reinforcement learning with TRL's `GRPOTrainer`: verifiable questions, the python tool, a reward for exact answers.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/grpo.py \\
        --config recipes/pocket/grpo.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/grpo.py \\
        --config recipes/pocket/grpo.yaml --model_name_or_path me/my-sft

Without further keys this is the original's algorithm: on-policy, no KL term, advantages reward - mean over the
problem's 16 completions, and a loss normalised by the tokens of each problem (`loss_type: per_problem`). Unlike there,
ending the turn is learned too. Keys of `trl.GRPOConfig` that have an effect can be set, see `training/trl/keys.py`:
TRL's own losses, `beta`, or what generates completions. The pocket recipe adds a KL term, which keeps a tiny model
from forgetting what the problems do not ask for.

A reward function of your own takes `completions`, lists of messages with the tool's calls and results, `problem`, the
records of `train_files`, and what else TRL passes; it returns a number for each, or None where it does not apply:

    reward_funcs: [exact_answer, my_rewards.length_bonus]
    reward_weights: [1.0, 0.1]
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from evals.harness.asking import codec_of
from evals.tasks.replies import ReplyQuestion
from evals.tasks.table import answered_in_words, question_of
from modeling_nanochat.chat.python_tool import check_sandbox
from modeling_nanochat.chat.self_check import check_renderings
from modeling_nanochat.cli import text_table
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.text.records import Record, read_records
from modeling_nanochat.tokenization_nanochat import has_control_tokens, whole_messages
from recipes.training.arguments import ResumeArguments
from recipes.training.attention import AttentionArguments, set_attention
from recipes.training.data.bad_rows import BadRows
from recipes.training.data.mixtures import MixtureArguments, parse_mixture, read_sources, shares, shuffled
from recipes.training.model_card import CardArguments
from recipes.training.stage import beside, check_output
from recipes.training.trl.adapters import AdapterArguments
from recipes.training.trl.completions import CompletionsLog
from recipes.training.trl.held_out import HeldOutEvaluation
from recipes.training.trl.optimizers import training_options
from recipes.training.trl.per_problem import PerProblemLoss
from recipes.training.trl.rewards import EXACT_ANSWER, Rewarding, load_reward
from recipes.training.trl.rollouts import fitting, sampling_options
from recipes.training.trl.settings import GRPOSettings, parse_settings
from recipes.training.trl.stage import (
    check_rows,
    find_checkpoint,
    output_arguments,
    run_settings,
    run_trl_stage,
    start_log,
)
from recipes.training.trl.trainer import MuonTrainer, RateArguments


@dataclass
class GRPOArguments(
    CardArguments, RateArguments, AdapterArguments, AttentionArguments, MixtureArguments, ResumeArguments
):
    """Arguments that `trl.GRPOConfig` does not have. The rates are the original's."""

    embedding_lr: float = field(default=0.2, metadata={"help": "AdamW's rate for embeddings, at width 768."})
    unembedding_lr: float = field(default=0.004, metadata={"help": "AdamW's rate for the head, at width 768."})
    init_lr_fraction: float = field(default=0.05, metadata={"help": "Scales all three rates."})
    model_name_or_path: str = field(default="", metadata={"help": "Any chat model: folder or Hub id."})
    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Problems like GSM8K, or with `answer` and `rivals`: files, folders or Hub ids."},
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: [EXACT_ANSWER],
        metadata={"help": "exact_answer, and import paths such as my_rewards.length_bonus; see reward_weights."},
    )
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "Held-out problems for pass@k every eval_steps steps."}
    )
    eval_problems: int = field(default=400, metadata={"help": "Evaluate on the first so many of each of eval_files."})
    eval_samples: int = field(default=8, metadata={"help": "Completions of each of them: the largest k of pass@k."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished model in output_dir."})

    def __post_init__(self) -> None:
        CardArguments.__post_init__(self)
        MixtureArguments.__post_init__(self)
        for source in parse_mixture(self.mixture or [], "mixture"):
            if source.format:
                raise UserError(f"mixture ({source.source}): `format` is for conversations; leave it out")

    def problems(self, seed: int, bad: BadRows) -> Dataset:
        """The problems of `train_files` in their order, or of the mixture in the order of the seed.

        Raises:
            UserError: A source or a record is bad, or no problem is left.
        """
        if not self.mixture:
            return read_problems(self.train_files, bad)
        mixture = parse_mixture(self.mixture, "mixture")
        parts = read_sources(mixture, lambda records, *_: problem_rows(records, bad), seed, "mixture", self.max_rows)
        if PartialState().is_main_process:
            print(f"mixture:\n{text_table(shares(mixture, parts, 'problems', lambda _: 1))}", flush=True)
        return dataset_of(shuffled(parts, seed), "mixture", bad)


class NanoChatGRPOTrainer(MuonTrainer, PerProblemLoss, Rewarding, HeldOutEvaluation):
    """`GRPOTrainer` with Muon, completions from the chat engine, and the original's loss."""

    stage = "rl"


def main() -> None:
    args, training, given = parse_settings(GRPOArguments, GRPOSettings)
    output = output_arguments(args, training)
    if check_output(output, args.resume, run_settings(given)):
        return
    checkpoint = find_checkpoint(args, training, given)
    check_sandbox()
    rewards = [load_reward(name) for name in args.reward_funcs]
    bad, bad_held_out = BadRows(args.on_bad_row), BadRows(args.on_bad_row)
    problems = args.problems(training.seed, bad)
    held_out = None
    if args.eval_files:
        held_out = read_problems(args.eval_files, bad_held_out, args.eval_problems, "eval_files")
    check_rows(training, len(problems))
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    set_attention(model, args.attn_implementation, training.device, training.bf16)
    options = training_options(args, model, given)
    if has_control_tokens(tokenizer):
        check_renderings(tokenizer)
    codec = codec_of(model, tokenizer)
    sampling_options(training)  # may be refused
    context = model.config.max_position_embeddings
    problems = fitting(problems, codec, context, training, bad)
    held_out = held_out and fitting(held_out, codec, context, training, bad_held_out)
    check_rows(training, len(problems))
    args = replace(args, examples=args.examples_or_those_of(model))
    set_seed(training.seed)
    log = start_log(output.output_dir, training, checkpoint)

    def make_trainer() -> NanoChatGRPOTrainer:
        logged, training.log_completions = training.log_completions, False  # as text, not as TRL's tables
        trainer = NanoChatGRPOTrainer(
            model=model,
            args=training,
            train_dataset=problems,
            processing_class=tokenizer,
            reward_funcs=rewards,
            **options,
        )
        training.log_completions = logged
        if logged:
            path = beside(output.output_dir, "logs", ".completions.txt")
            trainer.add_callback(CompletionsLog(trainer, path, resumed=checkpoint is not None))
        if held_out:
            trainer.evaluate_on(held_out, args.eval_samples)
        return trainer

    run_trl_stage(make_trainer, args, training, given, output, log, checkpoint)


def read_problems(sources: list[str], bad: BadRows, first: int | None = None, what: str = "train_files") -> Dataset:
    """Dataset of the columns `prompt`, `problem` and `where`.

    `prompt` is the optional history and the question, `problem` the record as JSON, to grade replies, and `where` its
    file and line.

    Args:
        bad: Takes the records that are no problems: of no task, or of one that is not answered in words.
        first: Read only the first records of each source; None: all.
        what: Name of the setting, for errors.

    Raises:
        UserError: `bad` raises it, no problem is left, or answers cannot be graded on this machine.
    """
    return dataset_of(problem_rows(read_records(sources, what, first=first), bad), " ".join(sources), bad)


def problem_rows(records: Iterable[tuple[str, Record]], bad: BadRows) -> list[dict[str, Any] | None]:
    """A row of [`read_problems`] for each record; None for those that `bad` takes."""
    rows: list[dict[str, Any] | None] = []
    for where, record in records:
        try:
            question = answered_question(record, where)
        except UserError as error:
            bad.add(where, error)
            rows.append(None)
            continue
        question.check_grading()
        problem = json.dumps(record, default=str)
        rows.append({"prompt": whole_messages(question.messages), "problem": problem, "where": where})
    return rows


def dataset_of(rows: list[dict[str, Any] | None], name: str, bad: BadRows) -> Dataset:
    if problems := [row for row in rows if row is not None]:
        return Dataset.from_list(problems)
    raise UserError(f"{name}: no record is a problem; {' '.join(bad.summary())}")


def answered_question(record: dict[str, Any], where: str) -> ReplyQuestion:
    question = question_of(record, where)
    if not isinstance(question, ReplyQuestion):
        names = ", ".join(answered_in_words())
        raise UserError(f"{where}: a record of {question.name}; only replies to {names} can be rewarded")
    return question


if __name__ == "__main__":
    exit_on_user_error(main)
