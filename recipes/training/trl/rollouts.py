"""GRPO's completions from the chat engine, in place of TRL's loop of generation, parsing and tool calls.

TRL generates until every row has stopped, runs the calls, and starts again with the results from an empty cache. Here
the result of a call goes into the running row, equal prompts share a prefill, and rows that have ended leave.
"""

import warnings
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from evals.harness.asking import engine_of
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.python_tool import python
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.chat.turn import MAX_TOOL_CALLS, ChatCodec, Turn
from modeling_nanochat.errors import UserError, one_line
from modeling_nanochat.tokenization_nanochat import has_control_tokens

from ..batch_size import is_out_of_memory
from ..data.bad_rows import BadRows


def sampling_options(training: GRPOConfig) -> SamplingOptions:
    """How completions are sampled.

    Raises:
        UserError: An option is out of the engine's range.
    """
    return SamplingOptions(
        temperature=training.temperature,
        top_k=training.top_k,
        top_p=training.top_p,
        min_p=training.min_p or 0.0,
        repetition_penalty=training.repetition_penalty,
    )


def fitting(problems: Dataset, codec: ChatCodec, context: int, training: GRPOConfig, bad: BadRows) -> Dataset:
    """The problems whose `prompt` leaves room for a completion, without `where`; prints how many are left out.

    Room for `max_completion_length` tokens, or for half of the context where that is less.

    Raises:
        UserError: A problem is too long, unless `bad` counts those; or none is left.
    """
    longest = context - min(training.max_completion_length or context, context // 2)
    reason = f"more than {longest} tokens leave no room for a completion in the model's context of {context}"
    kept = []
    for number, (prompt, where) in enumerate(zip(problems["prompt"], problems["where"], strict=True)):
        if len(codec.prompt(prompt)) <= longest:
            kept.append(number)
        else:
            advice = "shorten it, lower max_completion_length, or set on_bad_row to skip"
            bad.add(where, UserError(f"{where}: {reason}; {advice}"))
    if not kept:
        raise UserError(f"{problems['where'][0]}: {reason}, nor do any of the others; lower max_completion_length")
    if training.process_index == 0:
        print(*bad.summary(), sep="\n", end="\n" if len(bad) else "")
    return problems.select(kept).remove_columns("where")


class EngineRollouts(GRPOTrainer):
    """Trainer mixin: completions come from the engine; reward functions get the messages of each as `reply`.

    With `use_vllm` or `use_transformers_continuous_batching` they come from TRL's loop, with the same python tool, and
    from `generate` for an architecture that the engine cannot decode (`misfit` says why). There is no tool without
    tokens for it.

    Raises:
        UserError: Decoding one of this project's models with the KV cache differs from the forward pass without it.
    """

    args: GRPOConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerFast
    engine: Engine  # none if there is a `misfit`
    misfit: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)  # TRL is pinned
            super().__init__(*args, **kwargs | generation(kwargs["args"], kwargs["processing_class"]))
        self.sampling = sampling_options(self.args)
        calls = self.args.max_tool_calling_iterations
        model: Any = self.model
        model = model.get_base_model() if is_peft_model(model) else model  # the adapters are in its layers
        try:  # checks decoding on the model's device and with TRL's patched forward
            self.engine = engine_of(model, self.processing_class, MAX_TOOL_CALLS if calls is None else calls)
        except Exception as error:  # another architecture may lack anything that the engine uses
            if has_control_tokens(self.processing_class) or is_out_of_memory(error):
                raise
            self.misfit, self.rollout_func = one_line(error), None
            if self.args.process_index == 0:
                print(f"completions come from transformers' generate, not from the chat engine: {self.misfit}")
        self.model.train()

    def sample(self, prompts: list[list[int]], seed: int, batch_size: int) -> list[Turn]:
        """A completion of each rendered prompt; equal prompts one after the other share a prefill."""
        longest = self.args.max_completion_length or self.engine.context
        turns, training = [self.engine.turn(prompt, longest, self.sampling) for prompt in prompts], self.model.training
        self.model.eval()  # without dropout
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            self.engine.complete(turns, self.engine.sampler(seed), batch_size)
        self.model.train(training)
        return turns


def generation(training: GRPOConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The trainer's arguments that say what generates completions; announced if it is not the engine with its tool."""
    tools, shown = [python] if has_control_tokens(tokenizer) else None, training.process_index == 0
    if shown and not tools:
        print("the tokenizer has no tokens for the python tool: completions are text only")
    names = {"use_vllm": "vLLM", "use_transformers_continuous_batching": "transformers' continuous batching"}
    if name := next((name for key, name in names.items() if getattr(training, key, False)), None):
        if shown:
            print(f"completions come from {name} and TRL's loop of tool calls, not from the chat engine")
        return {"tools": tools}
    return {"rollout_func": rollouts}


def rollouts(prompts: list[list[dict[str, Any]]], trainer: EngineRollouts) -> dict[str, Any]:
    """A completion of each prompt, as TRL's `rollout_func` returns them.

    `env_mask` is 1 where the model chose the token and 0 for the tool's output. The seed is drawn from torch's global
    state, which checkpoints restore and which differs between processes.
    """
    rendered = [trainer.engine.codec.prompt(prompt) for prompt in prompts]
    turns = trainer.sample(rendered, int(torch.randint(2**31, ())), batch_size=len(rendered))
    calls = torch.tensor([float(turn.tool_calls) for turn in turns], device=trainer.accelerator.device)
    trainer._metrics["train"]["tools/call_frequency"].append(trainer.accelerator.gather(calls).mean().item())
    return {
        "prompt_ids": rendered,
        "completion_ids": [turn.ids for turn in turns],
        "logprobs": None,  # recomputed by the trainer in the forward pass
        "env_mask": [[int(chosen) for chosen in turn.sampled] for turn in turns],
        "reply": [turn.messages for turn in turns],
    }
