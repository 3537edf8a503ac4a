"""The two architectures, registered with transformers' auto classes.

Plain replaces transformers' own classes of that `model_type`: same weights, same logits, nanochat's initialisation.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from .configuration_nanochat import NanoChatConfig
from .configuration_nanochat_turbo import NanoChatTurboConfig
from .modeling_nanochat import NanoChatForCausalLM, NanoChatModel, NanoChatPreTrainedModel  # noqa: F401
from .modeling_nanochat_turbo import (
    NanoChatTurboForCausalLM,
    NanoChatTurboModel,
    NanoChatTurboPreTrainedModel,  # noqa: F401
)

AutoConfig.register("nanochat", NanoChatConfig, exist_ok=True)
AutoModel.register(NanoChatConfig, NanoChatModel, exist_ok=True)
AutoModelForCausalLM.register(NanoChatConfig, NanoChatForCausalLM, exist_ok=True)

AutoConfig.register("nanochat_turbo", NanoChatTurboConfig)
AutoModel.register(NanoChatTurboConfig, NanoChatTurboModel)
AutoModelForCausalLM.register(NanoChatTurboConfig, NanoChatTurboForCausalLM)
# transformers does not ship turbo: its folders carry this code and load with `trust_remote_code` without the package.
NanoChatTurboConfig.register_for_auto_class()
NanoChatTurboModel.register_for_auto_class("AutoModel")
NanoChatTurboForCausalLM.register_for_auto_class("AutoModelForCausalLM")

# Short names of the two architectures.
ARCHITECTURES = {
    "plain": (NanoChatConfig, NanoChatForCausalLM),
    "turbo": (NanoChatTurboConfig, NanoChatTurboForCausalLM),
}


def is_nanochat(model: PreTrainedModel) -> bool:
    """Whether the model is of one of the two architectures."""
    return isinstance(model, NanoChatForCausalLM | NanoChatTurboForCausalLM)
