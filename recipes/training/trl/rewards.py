"""Reward functions: the built-in exact answer, graded as in the evaluation, and functions by import path."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from numbers import Real
from typing import Any

import torch
from accelerate.utils import gather
from trl import GRPOTrainer

from evals.tasks.replies import ReplyQuestion, last_words
from evals.tasks.table import question_of
from modeling_nanochat.errors import UserError

EXACT_ANSWER = "exact_answer"


def load_reward(name: str) -> Callable[..., Any]:
    """The reward function `name`: `exact_answer`, or an import path, looked up in the working directory too.

    Raises:
        UserError: The path does not import, or is not a function.
    """
    module, _, function = name.rpartition(".")
    if not module and name != EXACT_ANSWER:
        raise UserError(f"reward_funcs {name}: give {EXACT_ANSWER}, or an import path such as my_rewards.length_bonus")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), function) if module else exact_answer
    except Exception as error:  # the module's own code runs
        raise UserError(
            f"reward_funcs {name} cannot be imported ({described(error)}); give a function of an installed module or "
            f"of a file in {os.getcwd()}"
        ) from error
    if not callable(found) or not hasattr(found, "__name__"):
        raise UserError(f"reward_funcs {name} is a {type(found).__name__}, not a function")
    return found


def exact_answer(completions: list[list[dict]], problem: list[dict[str, Any]], **kwargs: Any) -> list[float]:
    """1.0 for completions, given by their messages, that are finished and correct as in the evaluation, else 0.0."""
    return [float(is_right(*pair)) for pair in zip(completions, problem, strict=True)]


def is_right(completion: list[dict], problem: dict[str, Any]) -> bool:
    question = question_of(problem, "train_files")
    return (
        isinstance(question, ReplyQuestion)
        and bool(last_words(completion))
        and question.extract(completion) == question.reference
    )


class Rewarding(GRPOTrainer):
    """Trainer mixin: reward functions are called as TRL calls them, and their mistakes end training in one line.

    `completions` are messages with the tool's calls and results, `problem` the records that `train_files` hold.
    `graded` keeps what this process rewarded last: prompt, completion, and the reward by each function.
    """

    reward_funcs: list[Any]  # functions only
    graded: Sequence[tuple[list[dict], list[dict], dict[str, float]]] = ()

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """Rewards of the completions of all processes, (completions, functions); NaN where a function gave None.

        Raises:
            UserError: A function raised, or did not return a finite number or None for each completion, or all
                functions returned None for all completions.
        """
        completions = [row.get("reply", each) for row, each in zip(inputs, completions, strict=True)]
        columns: dict[str, Any] = {key: [row[key] for row in inputs] for key in inputs[0].keys() - {"prompt", "reply"}}
        if "problem" in columns:
            columns["problem"] = [json.loads(record) for record in columns["problem"]]
        columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
        columns |= {"trainer_state": self.state, "log_metric": self._log_metric}
        rewards = [checked_rewards(function, len(completions), columns) for function in self.reward_funcs]
        if all(math.isnan(reward) for each in rewards for reward in each):
            raise UserError(f"reward_funcs {' '.join(self.reward_func_names)}: None for all completions of a step")
        by_completion = [dict(zip(self.reward_func_names, each, strict=True)) for each in zip(*rewards, strict=True)]
        self.graded = list(zip(prompts, completions, by_completion, strict=True))
        return gather(torch.tensor(rewards, device=self.accelerator.device).T.contiguous())


def checked_rewards(function: Callable[..., Any], count: int, columns: dict[str, Any]) -> list[float]:
    """The rewards that `function` gives to `count` completions, with NaN for None: it does not apply.

    Raises:
        UserError: It raised, or did not return a finite number or None for each completion.
    """
    where = f"reward_funcs {function.__name__}"
    try:
        rewards = function(**columns)
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # tensors and arrays
    except Exception as error:
        raise UserError(f"{where} raised {described(error)}") from error
    if not isinstance(rewards, list | tuple):
        raise UserError(f"{where} returned a {type(rewards).__name__}; return a list of one number per completion")
    if len(rewards) != count:
        raise UserError(f"{where} returned {len(rewards)} rewards for {count} completions")
    for reward in rewards:
        if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
            raise UserError(f"{where} returned {str(reward)[:80]!r} among the rewards; return finite numbers, or None")
    return [math.nan if reward is None else float(reward) for reward in rewards]


def described(error: Exception) -> str:
    """`KeyError: 'answer'`, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
