"""The candidates of `evals/speed/throughput.py`: transformers' own NanoChat, and this package's plain and turbo.

Equal names have equal weights, so transformers' model and plain must agree; a candidate is `<architecture> <mode>`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.models.nanochat import NanoChatConfig as BuiltInConfig
from transformers.models.nanochat import NanoChatForCausalLM as BuiltInModel

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.chat.decoding import CompiledDecoder, Decoder

ARCHITECTURES = ("transformers", "plain", "turbo")
Model = NanoChatForCausalLM | BuiltInModel
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)
Decode = Callable[[torch.Tensor, int], list[list[int]]]


@dataclass(frozen=True)
class Setting:
    """Sizes of the models, and their device, dtype and threads."""

    depth: int
    vocab_size: int
    context: int
    device: str
    dtype: torch.dtype
    threads: int

    def config(self, architecture: str) -> NanoChatConfig:
        config_class = NanoChatTurboConfig if architecture == "turbo" else NanoChatConfig
        return config_class.from_depth(self.depth, vocab_size=self.vocab_size, max_position_embeddings=self.context)


def build_model(architecture: str, setting: Setting) -> Model:
    """Return a float32 model with random weights, equal for equal parameter names."""
    config = setting.config(architecture)
    with torch.device(setting.device):
        if architecture == "transformers":
            model: Model = BuiltInModel(BuiltInConfig.from_dict(config.to_dict()))
        else:
            model = (NanoChatTurboForCausalLM if architecture == "turbo" else NanoChatForCausalLM)(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return fill_weights(model)


@torch.no_grad()
def fill_weights(model: AnyModel, seed: int = 0) -> AnyModel:
    """Fill the weights with normal noise: the initial zero head would make all tokens equally likely."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 2:
            scale = 3.0 if name.startswith("lm_head") else 1.0  # large logits, so that rounding decides no argmax
            weight.normal_(std=scale * weight.shape[1] ** -0.5, generator=generator)
    return model


def training_step(model: PreTrainedModel, setting: Setting, compiled: bool) -> Callable[[torch.Tensor], float]:
    """Return a step, ids (B, T) -> loss, that runs forward and backward as in training: autocast, float32 weights."""
    module = torch.compile(model.train(), fullgraph=True) if compiled else model.train()
    use_autocast = setting.dtype != torch.float32

    def step(ids: torch.Tensor) -> float:
        with torch.autocast(setting.device, setting.dtype, enabled=use_autocast):
            loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step


def training_steps(models: Mapping[str, PreTrainedModel], setting: Setting, compiled: bool) -> dict[str, Callable]:
    """Return the training candidates; transformers' class only uncompiled, as it is usually run."""
    steps = {}
    for architecture, model in models.items():
        steps[f"{architecture} eager"] = training_step(model, setting, compiled=False)
        if compiled and architecture != "transformers":
            steps[f"{architecture} compiled"] = training_step(model, setting, compiled=True)
    return steps


def decoders(models: dict[str, Model], setting: Setting, compiled: bool) -> dict[str, Decode]:
    """Return the greedy decoding candidates, in the setting's dtype: prompt ids (B, P) and n -> rows of n new ids."""
    calls: dict[str, Decode] = {}
    for architecture, model in models.items():
        model.eval().to(setting.dtype)
        calls[f"{architecture} generate"] = partial(generate, model)
        if compiled and architecture != "transformers":
            calls[f"{architecture} compiled"] = partial(decode_greedily, CompiledDecoder(model))
    return calls


def generate(model: Model, ids: torch.Tensor, new_tokens: int) -> list[list[int]]:
    mask = torch.ones_like(ids)
    rows = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return rows[:, ids.shape[1] :].tolist()


@torch.inference_mode()
def decode_greedily(
    decoder: Decoder, prompts: torch.Tensor | Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    prompts = prompts.tolist() if isinstance(prompts, torch.Tensor) else prompts
    tokens = [decoder.prefill(prompts, new_tokens).argmax(-1)]
    while len(tokens) < new_tokens:
        tokens.append(decoder.step(tokens[-1]).argmax(-1))
    return torch.stack(tokens, 1).tolist()
