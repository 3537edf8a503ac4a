"""Reinforcement learning with TRL's `GRPOTrainer`: verifiable questions, the python tool, a reward for exact answers.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/grpo.py \\
        --config recipes/pocket/grpo.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/grpo.py \\
        --config recipes/pocket/grpo.yaml --model_name_or_path me/my-sft

Keys of `trl.GRPOConfig` that have an effect can be set too, see `training/trl/keys.py`. The pocket recipe uses the
original's advantage, reward - group mean, on-policy, so that clipping never applies, but adds a KL term (`beta`) that
keeps a tiny model from forgetting what the problems do not ask for. It normalises the loss by the tokens of all the
problems in its single micro-batch. The original normalises per problem; for that, set `per_device_train_batch_size` to
`num_generations`, `gradient_accumulation_steps` to the number of problems per step, and `loss_type: bnpo`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from evals.tasks.replies import ReplyQuestion, last_words
from evals.tasks.table import answered_in_words, question_of
from modeling_nanochat.chat.python_tool import check_sandbox
from modeling_nanochat.chat.self_check import check_renderings
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.text.records import read_records
from modeling_nanochat.tokenization_nanochat import whole_messages
from recipes.training.attention import AttentionArguments, set_attention
from recipes.training.model_card import CardArguments
from recipes.training.stage import check_output
from recipes.training.trl.rollouts import EngineRollouts, fitting, sampling_options
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
class GRPOArguments(CardArguments, RateArguments, AttentionArguments):
    """Arguments that `trl.GRPOConfig` does not have."""

    model_name_or_path: str = field(default="", metadata={"help": "Fine-tuned model: folder or Hub id."})
    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Problems like GSM8K, or with `answer` and `rivals`: files, folders or Hub ids."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished model in output_dir."})


class NanoChatGRPOTrainer(MuonTrainer, EngineRollouts):
    """`GRPOTrainer` with Muon and completions from the chat engine."""

    stage = "rl"


def main() -> None:
    args, training, given = parse_settings(GRPOArguments, GRPOSettings)
    output = output_arguments(args, training)
    if check_output(output, training.resume_from_checkpoint, run_settings(given), "--resume_from_checkpoint"):
        return
    checkpoint = find_checkpoint(training)
    check_sandbox()
    problems = read_problems(args.train_files)
    check_rows(training, len(problems))
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, dtype=torch.float32, device="cpu")
    set_attention(model, args.attn_implementation, training.device, training.bf16)
    check_renderings(tokenizer)
    sampling_options(training)  # may be refused
    problems = fitting(problems, tokenizer, model.config.max_position_embeddings, training)
    check_rows(training, len(problems))
    args = replace(args, examples=args.examples_or_those_of(model))
    set_seed(training.seed)
    log = start_log(output.output_dir, training, checkpoint)

    def make_trainer() -> NanoChatGRPOTrainer:
        return NanoChatGRPOTrainer(
            model=model,
            args=training,
            train_dataset=problems,
            processing_class=tokenizer,
            reward_funcs=exact_answer,
            muon_rates=args.scaled(),
        )

    run_trl_stage(make_trainer, args, training, given, output, log, checkpoint)


def read_problems(sources: list[str]) -> Dataset:
    """Dataset of `prompt`, the optional history and the question, and `problem`, the record as JSON, to grade replies.

    Raises:
        UserError: No problem, or a record of a task that is not answered in words (names file and line) or whose
            answers cannot be graded on this machine.
    """
    problems = []
    for where, record in read_records(sources, "train_files"):
        question = question_of(record, where)
        if not isinstance(question, ReplyQuestion):
            names = ", ".join(answered_in_words())
            raise UserError(f"{where}: a record of {question.name}; only replies to {names} can be rewarded")
        question.check_grading()
        problems.append({"prompt": whole_messages(question.messages), "problem": json.dumps(record, default=str)})
    return Dataset.from_list(problems)


def exact_answer(reply: list[list[dict]], problem: list[str], **kwargs: Any) -> list[float]:
    """1.0 for replies, given by their messages, that are finished and correct as in the evaluation, else 0.0."""
    return [float(is_right(*pair)) for pair in zip(reply, map(json.loads, problem), strict=True)]


def is_right(completion: list[dict], problem: dict[str, Any]) -> bool:
    question = question_of(problem, "train_files")
    return (
        isinstance(question, ReplyQuestion)
        and bool(last_words(completion))
        and question.extract(completion) == question.reference
    )


if __name__ == "__main__":
    exit_on_user_error(main)
