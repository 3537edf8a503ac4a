"""NanoChat for transformers: model, configuration, tokenizer rules, chat engine and python tool.

Classes are imported lazily: the first access imports torch and registers both architectures with transformers' auto
classes (`registered.py`), so commands that need no model start fast.
"""

from typing import TYPE_CHECKING, Any

from .errors import end_on_interrupt, is_imported_by_command

if is_imported_by_command(__name__):
    end_on_interrupt()

if TYPE_CHECKING:
    from .registered import (
        ARCHITECTURES,
        NanoChatConfig,
        NanoChatForCausalLM,
        NanoChatModel,
        NanoChatPreTrainedModel,
        NanoChatTurboConfig,
        NanoChatTurboForCausalLM,
        NanoChatTurboModel,
        NanoChatTurboPreTrainedModel,
    )

__all__ = [
    "ARCHITECTURES",
    "NanoChatConfig",
    "NanoChatForCausalLM",
    "NanoChatModel",
    "NanoChatPreTrainedModel",
    "NanoChatTurboConfig",
    "NanoChatTurboForCausalLM",
    "NanoChatTurboModel",
    "NanoChatTurboPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import registered

    return getattr(registered, name)
