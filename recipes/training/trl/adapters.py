"""LoRA adapters in SFT and GRPO: PEFT's, by the keys of TRL's `ModelConfig`."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import is_peft_available
from trl import ModelConfig, get_peft_config

from modeling_nanochat.errors import UserError


@dataclass(kw_only=True)
class AdapterArguments:
    """The same options in both stages; all but `merge_adapter` are TRL's, with its defaults."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter in place of the model's weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter counts lora_alpha / lora_r times."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Share of the adapter's inputs that training drops."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers; default: PEFT's for the architecture, else all-linear."}
    )
    lora_target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters that are no layers."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers to train in full."})
    use_rslora: bool = field(default=False, metadata={"help": "Count lora_alpha / sqrt(lora_r) times instead."})
    use_dora: bool = field(default=False, metadata={"help": "Train direction and magnitude separately."})
    merge_adapter: bool = field(
        default=True, metadata={"help": "Save a whole model with the adapter merged; false: the adapter alone."}
    )

    @property
    def unused(self) -> set[str]:
        """Of these options, those without effect."""
        return set() if self.use_peft else {each.name for each in fields(AdapterArguments)}

    def adapter(self, model: PreTrainedModel) -> Any:
        """PEFT's configuration; None without `use_peft`.

        Raises:
            UserError: PEFT is not installed, or rejects a value.
        """
        if not self.use_peft:
            return None
        if not is_peft_available():
            raise UserError("use_peft needs peft, which is not installed: pip install peft")
        given = {each.name: getattr(self, each.name) for each in fields(AdapterArguments)}
        del given["merge_adapter"]
        if not (self.lora_target_modules or self.lora_target_parameters or has_default_layers(model)):
            given["lora_target_modules"] = ["all-linear"]
        try:
            return get_peft_config(ModelConfig(**given))
        except (ValueError, TypeError) as error:
            raise UserError(f"use_peft: PEFT rejects its settings: {' '.join(str(error).split())}") from error


def has_default_layers(model: PreTrainedModel) -> bool:
    """Whether PEFT knows which layers of this architecture get an adapter."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
