"""What the two stages add to TRL's trainers: Muon, the learning watch, pretraining's log and progress line."""

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import TrainOutput

from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import has_control_tokens
from recipes.training.optim.optimizer import compiles_on, muon_adamw

from ..learning import LearningWatch
from ..loop import gradient_norm
from ..progress import LiveLine
from ..stage import JsonlLogger
from .resume import ResumableTrainer
from .settings import settings_errors

# The trainer's name -> the log's name
LOGGED = {
    "loss": "loss",
    "eval_loss": "validation_loss",
    "eval_runtime": "seconds_evaluating",
    "reward": "reward",
    "reward_std": "reward_std",
    "tools/call_frequency": "tool_calls_per_completion",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "clipped_ratio",
    "num_tokens": "tokens",
}


class Rates(TypedDict):
    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float


@dataclass
class RateArguments:
    """Learning rates of the optimizer's groups; the trainer's scheduler scales all of them equally."""

    matrix_lr: float = field(default=0.02, metadata={"help": "Muon's learning rate."})
    embedding_lr: float = field(default=0.3, metadata={"help": "AdamW's rate for embeddings, at width 768."})
    unembedding_lr: float = field(default=0.008, metadata={"help": "AdamW's rate for the head, at width 768."})
    init_lr_fraction: float = field(default=1.0, metadata={"help": "Scales all three rates."})

    def scaled(self) -> Rates:
        return {
            "matrix_lr": self.matrix_lr * self.init_lr_fraction,
            "embedding_lr": self.embedding_lr * self.init_lr_fraction,
            "unembedding_lr": self.unembedding_lr * self.init_lr_fraction,
        }


@contextmanager
def old_names() -> Iterator[None]:
    """Ignore that TRL 1.16 and PEFT use the names from before transformers 5.24."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


class MuonTrainer(ResumableTrainer):
    """Trainer mixin: Muon and AdamW with our groups, at the rates in `muon_rates`; `watch` observes every step.

    Without `muon_rates`, the optimizer is TRL's, by its own arguments: `optimizers.training_options` decides.
    """

    stage: str  # "sft" or "rl"
    model: PreTrainedModel
    train_dataset: Dataset
    processing_class: PreTrainedTokenizerFast
    _metrics: dict[str, dict[str, list[float]]]  # of both of TRL's trainers

    def __init__(self, model: PreTrainedModel, *args: Any, muon_rates: Rates | None, **kwargs: Any):
        self.muon_rates = muon_rates
        tokenizer = kwargs["processing_class"]
        self.special_tokens = special_tokens(model, tokenizer)
        # Older trainers would set these, with a warning; in the finished folder `set_special_tokens` sets them.
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.step_loss: torch.Tensor | float = 0.0
        with old_names():
            super().__init__(model, *args, **kwargs)
        self.learning = LearningCallback(self)
        self.add_callback(self.learning)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.muon_rates is None:
            with settings_errors():  # `optim` may need a package, or another device
                return super().create_optimizer(model)
        if self.optimizer is None:
            trained: Any = self.model if model is None else model  # possibly a wrapper that has the model's `config`
            self.optimizer = muon_adamw(
                trained,
                weight_decay=self.args.weight_decay,
                compile=compiles_on(self.args.device),
                **self.muon_rates,
            )
        return self.optimizer

    @property
    def optimizer_keys(self) -> set[str]:
        """Of TRL's arguments, those that the record holds though they were not given."""
        return set() if self.muon_rates else {"learning_rate", "optim"}

    @property
    def unused(self) -> set[str]:
        """Of the stage's arguments, those without effect."""
        return set() if self.muon_rates else {each.name for each in fields(RateArguments)}

    def finished_model(self, args: Any) -> PreTrainedModel:
        """The model to save: with the adapter merged, or the adapter alone, as `args.merge_adapter` says."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_peft_model(model) and args.merge_adapter:
            model = model.merge_and_unload()
        elif is_peft_model(model):
            for config in model.peft_config.values():
                config.base_model_name_or_path = args.model_name_or_path  # not the folder of the Hub's cache
        if not has_control_tokens(self.processing_class):  # else the stage sets them
            base = model.get_base_model() if is_peft_model(model) else model
            self.processing_class.pad_token, base.generation_config, ids = self.special_tokens
            base.config.update(ids)
        return model

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with old_names():
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss.detach()  # each micro-batch adds its part of the step's mean
        return loss

    def newest(self, metric: str) -> float | None:
        """The trainer's last measurement since it logged: its log may have only every tenth step."""
        values = self._metrics["train"].get(metric)
        return values[-1] if values else None


def special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[str | None, GenerationConfig, dict[str, Any]]:
    """What trainers change: the tokenizer's padding, the generation configuration, ids in the configuration."""
    ids = {name: getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer.pad_token, copy.deepcopy(model.generation_config), ids


class LearningCallback(TrainerCallback):
    """Stops training if loss or gradients are not finite; reports each sign of failed learning once."""

    def __init__(self, trainer: MuonTrainer):
        self.trainer = trainer
        trainer.watch = LearningWatch(trainer.stage, max_steps=0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.watch = LearningWatch(self.trainer.stage, state.max_steps)
        if self.trainer.resumed:
            self.trainer.watch.load_state_dict(self.trainer.resumed.state.learning)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Raise [`UserError`] on all processes before the optimizer uses values that are not finite."""
        loss, self.trainer.step_loss = torch.as_tensor(self.trainer.step_loss), 0.0
        asked = loss.new_tensor(float(self.trainer.is_asked_to_stop))
        measured = torch.stack([loss, gradient_norm(model).to(loss), asked])
        *self.measured, stops = self.trainer.accelerator.reduce(measured, "mean").tolist()  # one wait for the device
        self.trainer.stopping = stops > 0
        if not torch.tensor(self.measured).isfinite().all():
            rate = "init_lr_fraction" if self.trainer.muon_rates else "learning_rate"
            raise UserError(
                "the loss is {}, the norm of the gradients {} at step {}; the optimizer has not used them. Lower "
                "{}, or look at the training data".format(*self.measured, state.global_step + 1, rate)
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        loss, grad_norm = self.measured
        all_alike = self.trainer.newest("frac_reward_zero_std")  # share of groups whose rewards are all equal
        found = self.trainer.watch.observe(
            state.global_step,
            loss=loss,
            grad_norm=None if all_alike == 1 else grad_norm,  # 0 for that reason
            reward_std=None if all_alike is None else 1 - all_alike,
            clipped_ratio=self.trainer.newest("completions/clipped_ratio"),
        )
        self.warn(state, found)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if (loss := (metrics or {}).get("eval_loss")) is not None:
            self.warn(state, self.trainer.watch.observe_held_out(state.global_step, loss))

    def warn(self, state, found: list[str]) -> None:
        if state.is_world_process_zero:
            for warning in found:
                tqdm.write(f"warning: {warning}")  # above the bar
                sys.stdout.flush()


class JsonlLoggerCallback(TrainerCallback):
    """Shows the progress line, and writes the trainer's measurements to the stage's log."""

    def __init__(self, log: JsonlLogger, bar: bool = True):
        self.stage_log, self.bar = log, bar
        self.last = (0.0, 0.0)
        self.live: LiveLine | None = None
        self.measured = ""
        self.curves: dict[str, list[float]] = {"loss": [], "reward": []}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.live = LiveLine(state.max_steps, state.global_step, state.is_world_process_zero, self.bar)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.live:
            self.live.step(state.global_step, self.measured)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        held_out = {LOGGED.get(key, key.removeprefix("eval_")): logs[key] for key in logs if key.startswith("eval_")}
        if held_out:
            self.stage_log.log(step=state.global_step, **held_out)
            self.last = (self.last[0] + held_out["seconds_evaluating"], self.last[1])  # tokens/s are training's
        if held_out or not LOGGED.keys() & logs.keys() - {"num_tokens"}:
            return
        values = {name: float(logs[key]) for key, name in LOGGED.items() if key in logs}
        tokens = int(values.get("tokens", 0))
        values |= {"tokens": tokens, "tokens_per_second": self.tokens_per_second(tokens)}
        for name in self.curves.keys() & values.keys():
            self.curves[name].append(values[name])
        measured = [f"{name} {values[name]:.3f}" for name in self.curves if name in values]
        self.measured = ", ".join([*measured, f"{values['tokens_per_second']:,} tokens/s"])
        self.stage_log.log(step=state.global_step, **values)

    def close(self) -> None:
        if self.live:
            self.live.close()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Print how reward or loss changed."""
        self.close()
        name = "reward" if self.curves["reward"] else "loss"
        if self.live and len(values := self.curves[name]) > 1:
            count = max(1, len(values) // 10)
            first, last = (sum(tenth) / count for tenth in (values[:count], values[-count:]))
            line = f"{name} {last:.3f} over the last tenth of the steps, {first:.3f} over the first"
            self.live.write([f"step {state.global_step:,}: {line}"])

    def tokens_per_second(self, tokens: int) -> int:
        (seconds, before), self.last = self.last, (self.stage_log.seconds, tokens)
        return round((tokens - before) / max(self.stage_log.seconds - seconds, 1e-9))
