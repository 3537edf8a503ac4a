"""Conversion of the original's `model_config` to our configurations and back."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError

from ..configuration_nanochat import FLOAT32_EPSILON, NanoChatConfig
from ..configuration_nanochat_turbo import NanoChatTurboConfig
from ..errors import UserError

Architecture = Literal["plain", "turbo"]

# Fields that determine a model's logits beside its sizes and weights. `differences` compares three more.
LOGIT_FIELDS = (
    "intermediate_size",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
    "final_logit_softcapping",
    "layer_types",
    "sliding_window",
    "qk_scale",
)


@dataclass(frozen=True)
class OriginalConfig:
    """`model_config` of the original's meta file. `window_pattern` is None where the file has none."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str | None = None

    @classmethod
    def from_dict(cls, values: Any) -> "OriginalConfig":
        """Validate a `model_config` and return it.

        Raises:
            UserError: An entry is missing, unknown, or not a positive whole number; heads do not divide the width.
        """
        if not isinstance(values, dict):
            raise UserError("model_config is missing or not a mapping; it must hold the model's sizes")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise UserError(f"model_config has unknown entries {join_names(unknown)}; no architecture here knows them")
        for name in names[:-1]:
            if not isinstance(values.get(name), int) or isinstance(values[name], bool) or values[name] < 1:
                raise UserError(f"model_config.{name} is {values.get(name)!r}, expected a positive whole number")
        if not isinstance(values.get("window_pattern"), str | None):
            raise UserError(f"model_config.window_pattern is {values['window_pattern']!r}, expected letters S and L")
        sizes = cls(**values)
        if sizes.n_embd % sizes.n_head or sizes.n_head % sizes.n_kv_head:
            raise UserError(
                f"model_config: n_head {sizes.n_head} must divide n_embd {sizes.n_embd}, and be a multiple of "
                f"n_kv_head {sizes.n_kv_head}"
            )
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """The mapping as the original writes it, without None: the launch code accepts no `window_pattern`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def config_from_original(sizes: OriginalConfig, architecture: Architecture) -> NanoChatConfig:
    """Our configuration of an original model.

    A current model without `window_pattern` sees the full context in every layer, as in the original.

    Raises:
        UserError: Launch weights with sliding windows, which fit neither architecture; invalid sizes.
    """
    common: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.n_embd,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_kv_head,
        "max_position_embeddings": sizes.sequence_len,
    }
    pattern = sizes.window_pattern or "L"
    if architecture == "plain" and set(pattern.upper()) != {"L"}:
        raise UserError(
            f"launch weights with window_pattern {pattern!r}: no architecture here adds only windows to plain"
        )
    try:
        return (
            NanoChatConfig(**common)
            if architecture == "plain"
            else NanoChatTurboConfig(**common, window_pattern=pattern)
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"model_config: {' '.join(str(error).split())}") from error


def config_to_original(config: NanoChatConfig) -> tuple[OriginalConfig, Architecture]:
    """The original's `model_config` of a configuration, and its architecture.

    Raises:
        UserError: A setting that determines the logits differs from the value fixed in the original's code.
    """
    architecture = architecture_of(config)
    sizes = OriginalConfig(
        sequence_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_kv_head=config.num_key_value_heads,
        n_embd=config.hidden_size,
        window_pattern=config.window_pattern if architecture == "turbo" else None,
    )
    if different := differences(config, config_from_original(sizes, architecture)):
        details = ", ".join(f"{name} {getattr(config, name, None)!r}" for name in different)
        raise UserError(f"the original's code has fixed values other than {details}; its logits would differ")
    return sizes, architecture


def differences(config: NanoChatConfig, theirs: NanoChatConfig) -> list[str]:
    """Fields that make the logits of `config` differ from those of the original's code at the same sizes, `theirs`."""
    different = [name for name in LOGIT_FIELDS if getattr(config, name, None) != getattr(theirs, name, None)]
    head_dim = theirs.hidden_size // theirs.num_attention_heads
    fits = {
        "head_dim": (getattr(config, "head_dim", None) or head_dim) == head_dim,
        "rope_parameters": rope(config) == rope(theirs),
        # 1e-6 is transformers' default: a conversion that kept it is off by 5e-6 in logits, which is corrected here
        "rms_norm_eps": config.rms_norm_eps in (FLOAT32_EPSILON, 1e-6),
    }
    return different + [name for name, fit in fits.items() if not fit]


def rope(config: NanoChatConfig) -> tuple[str, float]:
    parameters = config.rope_parameters
    return parameters.get("rope_type", "default"), parameters["rope_theta"]


def architecture_of(config: Any) -> Architecture:
    """Architecture of a model folder's configuration.

    Raises:
        UserError: It is neither plain nor turbo.
    """
    known: dict[str, Architecture] = {"nanochat": "plain", "nanochat_turbo": "turbo"}
    if config.model_type not in known:
        raise UserError(f"model_type is {config.model_type!r}; only {join_names(list(known))} can be converted")
    return known[config.model_type]


def join_names(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
