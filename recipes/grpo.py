"""Reinforcement learning with TRL's `GRPOTrainer`: verifiable questions, the python tool, a reward for exact answers.

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/grpo.py \\
        --config recipes/pocket/grpo.yaml

    accelerate launch --quiet --config_file accelerate_configs/ddp_8gpu.yaml recipes/grpo.py \\
        --config recipes/pocket/grpo.yaml --model_name_or_path me/my-sft

Keys of `trl.GRPOConfig` that have an effect can be set too, see `training/trl/settings.py`. The pocket recipe uses the
original's advantage, reward - group mean, on-policy, so that clipping never applies, but adds a KL term (`beta`) that
keeps a tiny model from forgetting what the problems do not ask for. It normalises the loss by the tokens of all the
problems in its single micro-batch. The original normalises per problem; for that, set `per_device_train_batch_size` to
`num_generations`, `gradient_accumulation_steps` to the number of problems per step, and `loss_type: bnpo`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOTrainer

from evals.tasks.formats import check_gsm8k, check_match, kind_of, match_answers, question_messages
from evals.tasks.generative import extract_match
from evals.tasks.gsm8k import is_correct, last_words
from modeling_nanochat.chat.python_tool import check_sandbox, python
from modeling_nanochat.chat.self_check import check_cached_decoding, check_renderings
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.text.records import read_jsonl
from modeling_nanochat.text.sources import expand
from modeling_nanochat.tokenization_nanochat import whole_characters, whole_messages
from recipes.training.attention import AttentionArguments, set_attention
from recipes.training.model_card import CardArguments
from recipes.training.stage import check_output
from recipes.training.trl.settings import GRPOSettings, parse_settings
from recipes.training.trl.stage import (
    MuonTrainer,
    RateArguments,
    check_rows,
    find_checkpoint,
    output_arguments,
    run_settings,
    run_trl_stage,
    start_log,
)

CHECKS = {"gsm8k": check_gsm8k, "match": check_match}  # record kinds with verifiable replies


@dataclass
class GRPOArguments(CardArguments, RateArguments, AttentionArguments):
    """Arguments that `trl.GRPOConfig` does not have."""

    model_name_or_path: str = field(default="", metadata={"help": "Fine-tuned model: folder or Hub id."})
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "JSONL in GSM8K format, or with `answer` and `rivals`."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a finished model in output_dir."})


class NanoChatGRPOTrainer(MuonTrainer, GRPOTrainer):
    """`GRPOTrainer` with Muon.

    Raises:
        UserError: Decoding with the KV cache differs from the forward pass without it.
    """

    stage = "rl"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_cached_decoding(self.model)  # on its device and with TRL's patched forward, as in rollouts


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
            tools=[python],
            muon_rates=args.scaled(),
        )

    run_trl_stage(make_trainer, args, training, given, output, log, checkpoint)


def read_problems(patterns: list[str]) -> Dataset:
    """Dataset of `prompt` (optional history and the question) and the columns that grade a reply.

    These are `kind` ("gsm8k" or "match", see `evals.tasks.formats`), `answer` (the reference ending in `#### n`, or
    the words a correct reply contains) and `rivals` (words it must not contain).

    Raises:
        UserError: No file, or a line of neither kind; names file and line.
    """
    problems = []
    for name in expand(patterns, "train_files"):
        for line, problem in read_jsonl(name):
            where, kind = f"{name}:{line}", kind_of(problem)
            if kind not in CHECKS:
                raise UserError(
                    f"{where}: expected `question` and an `answer` that ends in '#### number', "
                    "or `question`, `answer` and `rivals`"
                )
            CHECKS[kind](problem, where)
            answers = [problem["answer"]] if kind == "gsm8k" else match_answers(problem)
            problems.append(
                {
                    "prompt": whole_messages(question_messages(problem)),
                    "kind": kind,
                    "answer": [whole_characters(answer) for answer in answers],
                    "rivals": [whole_characters(rival) for rival in problem.get("rivals", [])],
                }
            )
    if not problems:
        listed = ", ".join(patterns) or "an empty list"
        raise UserError(f"train_files: no problem in {listed}; give a file in GSM8K format")
    return Dataset.from_list(problems)


def exact_answer(
    prompts: list,
    completions: list[list[dict]],
    kind: list[str],
    answer: list[list[str]],
    rivals: list[list[str]],
    **kwargs,
) -> list[float]:
    """1.0 for completions that are finished and correct, graded as in the evaluation, else 0.0."""
    references = zip(completions, kind, answer, rivals, strict=True)
    return [float(is_right(*reference)) for reference in references]


def is_right(completion: list[dict], kind: str, answer: list[str], rivals: list[str]) -> bool:
    words = last_words(completion)
    if kind == "gsm8k":
        return is_correct(words, answer[0])
    return bool(words) and bool(extract_match({"answer": answer, "rivals": rivals}, completion))


if __name__ == "__main__":
    exit_on_user_error(main)
