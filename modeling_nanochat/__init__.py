"""NanoChat for transformers: model, configuration, tokenizer rules, chat engine and python tool.

Importing the package registers its classes over the ones of transformers with the same `model_type`: same weights,
same logits, nanochat's initialisation.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_nanochat import NanoChatConfig
from .modeling_nanochat import NanoChatForCausalLM, NanoChatModel, NanoChatPreTrainedModel

AutoConfig.register("nanochat", NanoChatConfig, exist_ok=True)
AutoModel.register(NanoChatConfig, NanoChatModel, exist_ok=True)
AutoModelForCausalLM.register(NanoChatConfig, NanoChatForCausalLM, exist_ok=True)

__all__ = ["NanoChatConfig", "NanoChatForCausalLM", "NanoChatModel", "NanoChatPreTrainedModel"]
