"""Configuration of the plain NanoChat architecture: the fields of transformers' own class with nanochat's defaults."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# torch's `rms_norm` without an epsilon uses float32's machine epsilon in every dtype; the original relies on it.
FLOAT32_EPSILON = 2.0**-23
HEAD_DIM = 128
ASPECT_RATIO = 64

# `int | Derived`: None may be given, from which `__post_init__` derives a value, so readers never see None. For a type
# checker the alias is Any, which allows both; transformers, which validates fields at runtime, reads `int | None`.
if TYPE_CHECKING:
    Derived = Any
else:
    Derived = None


@strict
class NanoChatConfig(PreTrainedConfig):
    """Sizes and constants of a NanoChat model.

    `intermediate_size` defaults to 4 x `hidden_size`, `num_key_value_heads` to `num_attention_heads`, the rotary base
    to 10,000. A folder saved with this configuration also opens with transformers' own `NanoChatConfig`.

    Raises:
        ValueError: Width, heads and head dimension do not fit together.
    """

    model_type = "nanochat"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    vocab_size: int = 65536
    hidden_size: int = 768
    intermediate_size: int | Derived = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | Derived = None
    max_position_embeddings: int = 2048
    hidden_act: str = "relu2"
    attention_dropout: float | int = 0.0
    rms_norm_eps: float = FLOAT32_EPSILON
    initializer_range: float = 0.02
    rope_parameters: dict | Derived = None
    use_cache: bool = True
    final_logit_softcapping: float | None = 15.0
    attention_bias: bool = False
    # Set from the tokenizer; transformers' defaults (0, 1, 1) would freeze the embedding of token 1 as padding.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        self.check_heads()

    def check_heads(self) -> None:
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if heads < 1 or groups < 1 or heads % groups:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
        if getattr(self, "head_dim", None) is None and width % heads:
            raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads}")
        if self.dim_of_heads % 2:
            raise ValueError(f"the head dimension {self.dim_of_heads} must be even, for rotary position embeddings")

    @property
    def dim_of_heads(self) -> int:
        """Width of one head: `head_dim` if set, otherwise `hidden_size / num_attention_heads`."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_depth(
        cls, depth: int, *, aspect_ratio: int = ASPECT_RATIO, head_dim: int = HEAD_DIM, **overrides
    ) -> "NanoChatConfig":
        """The configuration for a depth: width = depth x `aspect_ratio`, rounded up to a multiple of `head_dim`.

        Args:
            depth: Number of layers.
            aspect_ratio: Width per layer.
            head_dim: Width of one attention head.
            overrides: Any field of the configuration, set by name.
        """
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        heads = -(-depth * aspect_ratio // head_dim)
        derived = {"num_hidden_layers": depth, "hidden_size": heads * head_dim, "num_attention_heads": heads}
        return cls(**(derived | overrides))
