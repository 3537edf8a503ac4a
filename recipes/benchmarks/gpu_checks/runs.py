"""Training as the recipes do it, without data and files: the same accelerator, compiler, loss and optimizer."""

import copy
import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from evals.speed.candidates import fill_weights
from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from recipes.training.arguments import LoopArguments
from recipes.training.attention import choose_attention
from recipes.training.device import maybe_compile
from recipes.training.loop import accumulate, all_reduce_loss, prepare
from recipes.training.optim.hyperparameters import Plan, resolve_hyperparameters
from recipes.training.optim.optimizer import MuonAdamW
from recipes.training.setup import make_accelerator
from recipes.training.stopping import StopRequest

from . import Setting

VOCABULARIES = {"plain": 65536, "turbo": 32768}
STEPS = 1000  # of the plan: warm-up and decay are of no interest
TOY = {"aspect_ratio": 8, "head_dim": 32, "vocab_size": 512}


@dataclass
class TrainingRun:
    """A model in training, whose `batch` is the same again and again unless it is exchanged."""

    accelerator: Accelerator
    model: PreTrainedModel
    module: torch.nn.Module
    optimizer: MuonAdamW
    plan: Plan
    batch: dict[str, torch.Tensor]
    steps: int = 0
    request: StopRequest = field(default_factory=StopRequest)

    @property
    def tokens(self) -> int:
        return self.batch["input_ids"][:, 1:].numel()

    def backward(self) -> float:
        """Forward and backward pass; the loss."""
        losses = accumulate(self.accelerator, self.module, [self.batch])
        return all_reduce_loss(self.accelerator, losses, self.request, None)[0]

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def pass_alone(self) -> float:
        loss = self.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def step(self) -> float:
        """A whole optimizer step of one pass; the loss."""
        self.plan.schedule().apply(self.optimizer, self.steps)
        loss = self.backward()
        self.update()
        self.steps += 1
        return loss


def bare_accelerator(setting: Setting, rows: int, length: int) -> Accelerator:
    options = LoopArguments(max_length=length, total_batch_size=rows * length, per_device_train_batch_size=rows)
    return make_accelerator(options, str(Path(setting.work_dir, "bare")))


def make_plan(config: NanoChatConfig, rows: int, length: int) -> Plan:
    return resolve_hyperparameters(config, "current", max_length=length, max_steps=STEPS, total_batch_size=rows * length)


def make_run(
    setting: Setting,
    config: NanoChatConfig,
    rows: int,
    length: int,
    *,
    fill: bool = True,
    compiled: bool | None = None,
    accelerator: Accelerator | None = None,
) -> TrainingRun:
    """A run as `recipes/pretrain.py` would set it up.

    Args:
        fill: Random numbers in all matrices. The initialisation has zeros in many, which a GPU multiplies faster.
        compiled: Default: on a GPU.
        accelerator: Default: a new one.
    """
    compiled = setting.on_gpu if compiled is None else compiled
    config = copy.deepcopy(config)  # the implementation of attention is written into it
    torch.compiler.reset()  # what was compiled for other runs counts against the limit of versions
    accelerator = accelerator or bare_accelerator(setting, rows, length)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = ARCHITECTURES[architecture_of(config)][1](config)
    model = fill_weights(model) if fill else model
    plan = make_plan(config, rows, length)
    module, optimizer = prepare(accelerator, model, plan)
    module = maybe_compile(module, compiled, accelerator)
    choose_attention(model, setting.attn_implementation, compiled, accelerator)
    return TrainingRun(accelerator, model, module, optimizer, plan, make_batch(setting, config, rows, length))


def architecture_of(config: NanoChatConfig) -> str:
    return next(name for name, (kind, _) in ARCHITECTURES.items() if type(config) is kind)


def make_config(setting: Setting, architecture: str, depth: int, layers: int | None = None, **more: object) -> NanoChatConfig:
    """Of the width of `depth`; toy-sized on a CPU."""
    sizes = {"vocab_size": VOCABULARIES[architecture], "max_position_embeddings": 2048}
    if not setting.on_gpu:
        sizes |= TOY | {"max_position_embeddings": 128}
    if architecture == "turbo" and setting.window_pattern:
        sizes["window_pattern"] = setting.window_pattern
    sizes |= more
    return ARCHITECTURES[architecture][0].from_depth(depth, **sizes | ({"num_hidden_layers": layers} if layers else {}))


def make_batch(setting: Setting, config: NanoChatConfig, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as the loader makes it, of text that can be learnt: nine of ten tokens follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.vocab_size
    noise = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
    ids, follows = noise.clone(), torch.rand(rows, length + 1, generator=generator) < 0.9
    for column in range(1, length + 1):
        ids[:, column] = torch.where(follows[:, column], (ids[:, column - 1] * 31 + 7) % vocabulary, noise[:, column])
    return {"input_ids": ids.pin_memory() if setting.on_gpu else ids}


def free() -> None:
    """Give memory that nothing refers to any more back to the device; its peak is counted anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
