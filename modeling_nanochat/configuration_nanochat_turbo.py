"""Configuration of the turbo architecture: plain's fields, and what decides windows, value embeddings and scales."""

import copy

from huggingface_hub.dataclasses import strict

from .configuration_nanochat import NanoChatConfig

WINDOW_STEP = 128
LAYER_TYPES = {"S": "sliding_attention", "L": "full_attention"}


@strict
class NanoChatTurboConfig(NanoChatConfig):
    """Sizes and constants of a turbo NanoChat model.

    `window_pattern` is tiled over the layers: S sees a quarter of the context (rounded up to 128 tokens), L all of it;
    the last layer is always L. `layer_types` and `sliding_window` follow from it unless given. `sliding_window` counts
    as transformers does, the token itself included.

    Raises:
        ValueError: An unknown letter in the pattern, or sizes that do not fit together.
    """

    model_type = "nanochat_turbo"

    base_model_tp_plan = None  # value embeddings and their gates are not cut by heads

    vocab_size: int = 32768
    window_pattern: str = "SSSL"
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    qk_scale: float = 1.2

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
        if self.layer_types is None:
            self.layer_types = self.layer_types_of_pattern()
        if self.sliding_window is None:
            self.sliding_window = -(-self.max_position_embeddings // (4 * WINDOW_STEP)) * WINDOW_STEP + 1
        super().__post_init__(**kwargs)

    def layer_types_of_pattern(self) -> list[str]:
        pattern = self.window_pattern.upper()
        if not pattern or set(pattern) - set(LAYER_TYPES):
            raise ValueError(f"window_pattern={self.window_pattern!r} must be made of S (short) and L (long)")
        letters = [pattern[i % len(pattern)] for i in range(self.num_hidden_layers - 1)] + ["L"]
        return [LAYER_TYPES[letter] for letter in letters]

    @property
    def value_embedding_layers(self) -> list[int]:
        """Every second layer, counted so that the last one is among them."""
        return list(range((self.num_hidden_layers - 1) % 2, self.num_hidden_layers, 2))

    @property
    def smear_layer_type(self) -> str:
        """Kind of cache that remembers the token before: a window suffices where the model has one."""
        return min(self.layer_types, key=lambda kind: kind != LAYER_TYPES["S"])

    def get_text_config(self, decoder=None, encoder=None) -> "NanoChatTurboConfig":
        """What transformers builds its caches from: one layer more, the smear's memory.

        Dynamic, static, quantized and paged caches all ask here how many layers they need and of which kind; so each of
        them carries the memory, and reorders, crops and shares it like any other layer.
        """
        if self.__dict__.get("counts_smear_memory"):
            return self
        view = copy.copy(self)
        view.__dict__.update(
            num_hidden_layers=self.num_hidden_layers + 1,
            layer_types=[*self.layer_types, self.smear_layer_type],
            counts_smear_memory=True,
        )
        return view
