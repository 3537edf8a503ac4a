"""Training as in the recipes, without data and files: same accelerator, compilation, loss and optimizer."""

import copy
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
from recipes.training.optim.overrides import Overrides
from recipes.training.setup import make_accelerator
from recipes.training.stopping import StopRequest

from . import Setting

VOCABULARIES = {"plain": 65536, "turbo": 32768}
STEPS = 1000  # max_steps of the plan, large enough that warm-up and decay do not matter
TOY = {"aspect_ratio": 8, "head_dim": 32, "vocab_size": 512}


@dataclass
class TrainingRun:
    """A model in training that uses the same `batch` in every step until it is replaced."""

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
        """Run a forward and backward pass and return the loss."""
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
        """Run an optimizer step with one pass and return the loss."""
        self.plan.schedule().apply(self.optimizer, self.steps)
        loss = self.backward()
        self.update()
        self.steps += 1
        return loss


def bare_accelerator(setting: Setting, rows: int, length: int) -> Accelerator:
    options = LoopArguments(max_length=length, total_batch_size=rows * length, per_device_train_batch_size=rows)
    return make_accelerator(options, str(Path(setting.work_dir, "bare")))


def make_plan(config: NanoChatConfig, rows: int, length: int) -> Plan:
    overrides = Overrides(max_steps=STEPS, total_batch_size=rows * length)
    return resolve_hyperparameters(config, "current", overrides, max_length=length)


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
    """Set up a run as in `recipes/pretrain.py`.

    Args:
        fill: Fill all matrices with random numbers. Many are initialised to zeros, which a GPU multiplies faster.
        compiled: Whether to compile; default: on a GPU only.
        accelerator: A new one by default.
    """
    compiled = setting.on_gpu if compiled is None else compiled
    config = copy.deepcopy(config)  # choose_attention writes the implementation into it
    torch.compiler.reset()  # earlier runs would count against the recompile limit
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


def make_config(
    setting: Setting, architecture: str, depth: int, layers: int | None = None, **more: object
) -> NanoChatConfig:
    """A config with the width of `depth` and optionally fewer layers; toy-sized on a CPU."""
    sizes = {"vocab_size": VOCABULARIES[architecture], "max_position_embeddings": 2048}
    if not setting.on_gpu:
        sizes |= TOY | {"max_position_embeddings": 128}
    if architecture == "turbo" and setting.window_pattern:
        sizes["window_pattern"] = setting.window_pattern
    sizes |= more | ({"num_hidden_layers": layers} if layers else {})
    return ARCHITECTURES[architecture][0].from_depth(depth, **sizes)


def make_batch(
    setting: Setting, config: NanoChatConfig, rows: int, length: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch as from the loader, of learnable text: 90 % of the tokens follow from the previous one."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.vocab_size
    noise = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
    ids, follows = noise.clone(), torch.rand(rows, length + 1, generator=generator) < 0.9
    for column in range(1, length + 1):
        ids[:, column] = torch.where(follows[:, column], (ids[:, column - 1] * 31 + 7) % vocabulary, noise[:, column])
    return {"input_ids": ids.pin_memory() if setting.on_gpu else ids}
