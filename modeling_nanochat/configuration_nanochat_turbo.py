"""Configuration of the turbo architecture: plain's fields, and those of windows, value embeddings and scales."""

from huggingface_hub.dataclasses import strict

from .configuration_nanochat import Derived, NanoChatConfig

WINDOW_STEP = 128
SMALLEST_WIDTH = 24
SMALLEST_HEAD = 8
LAYER_TYPES = {"S": "sliding_attention", "L": "full_attention"}


@strict
class NanoChatTurboConfig(NanoChatConfig):
    """Sizes and constants of a turbo NanoChat model.

    `window_pattern` is tiled over the layers: S sees a quarter of the context (rounded up to 128 tokens), L all of it;
    the last layer is always L. `layer_types` and `sliding_window` follow from it unless given. `sliding_window` counts
    as in transformers, including the token itself.

    Raises:
        ValueError: An unknown letter in the pattern, or sizes that do not fit together.
    """

    model_type = "nanochat_turbo"

    base_model_tp_plan = None  # value embeddings and their gates are not split by heads

    vocab_size: int = 32768
    window_pattern: str = "SSSL"
    layer_types: list[str] | Derived = None
    sliding_window: int | Derived = None
    qk_scale: float = 1.2

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0}
        if self.layer_types is None:
            self.layer_types = self.layer_types_of_pattern()
        if self.sliding_window is None:
            self.sliding_window = -(-self.max_position_embeddings // (4 * WINDOW_STEP)) * WINDOW_STEP + 1
        super().__post_init__(**kwargs)
        self.check_turbo()

    def check_turbo(self) -> None:
        if self.hidden_size < SMALLEST_WIDTH:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be at least {SMALLEST_WIDTH}, which smear's gate reads"
            )
        if self.dim_of_heads < SMALLEST_HEAD:
            raise ValueError(
                f"the head dimension {self.dim_of_heads} must be at least {SMALLEST_HEAD} for smear's memory"
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES.values())):
            raise ValueError(f"layer_types: {unknown[0]} is not one of {', '.join(LAYER_TYPES.values())}")

    def layer_types_of_pattern(self) -> list[str]:
        pattern = self.window_pattern.upper()
        if not pattern or set(pattern) - set(LAYER_TYPES):
            raise ValueError(f"window_pattern={self.window_pattern!r} must be made of S (short) and L (long)")
        letters = [pattern[i % len(pattern)] for i in range(self.num_hidden_layers - 1)] + ["L"]
        return [LAYER_TYPES[letter] for letter in letters]

    @property
    def value_embedding_layers(self) -> list[int]:
        """Every second layer, counted back from the last."""
        return list(range((self.num_hidden_layers - 1) % 2, self.num_hidden_layers, 2))

    @property
    def smear_layer_type(self) -> str:
        """Type of the cache layer that keeps the previous token: sliding if the model has any sliding layer."""
        return LAYER_TYPES["S" if LAYER_TYPES["S"] in self.__dict__["layer_types"] else "L"]

    def get_text_config(self, decoder=None, encoder=None) -> "NanoChatTurboConfig":
        """The configuration that transformers builds caches from: one more layer, for smear's memory.

        Dynamic, static and paged caches all read the number and types of their layers here, so each of them holds
        the memory, and reorders, crops and shares it like any other layer.
        """
        view = object.__new__(NanoChatTurboCacheConfig)
        view.__dict__ = self.__dict__  # shared: writes to the view change this configuration
        return view


class NanoChatTurboCacheConfig(NanoChatTurboConfig):
    """A view of the same configuration with one more layer: see [`NanoChatTurboConfig.get_text_config`]."""

    @property  # type: ignore[misc]  # mypy allows no property in place of a field
    def num_hidden_layers(self) -> int:
        return self.__dict__["num_hidden_layers"] + 1

    @num_hidden_layers.setter
    def num_hidden_layers(self, layers: int) -> None:
        self.__dict__["num_hidden_layers"] = layers - 1

    @property  # type: ignore[misc]  # mypy allows no property in place of a field
    def layer_types(self) -> list[str]:
        return [*self.__dict__["layer_types"], self.smear_layer_type]

    @layer_types.setter
    def layer_types(self, layer_types: list[str]) -> None:
        self.__dict__["layer_types"] = layer_types[:-1]

    def get_text_config(self, decoder=None, encoder=None) -> "NanoChatTurboCacheConfig":
        return self
