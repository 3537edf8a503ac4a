"""Sizes computed from a configuration alone: parameters, FLOPs, windows, bytes of training and of the KV cache.

Every function takes a plain or a turbo configuration and computes what the original reports for the same sizes. FLOPs
count matrix products only, two per multiply-add: no norms, softmax or lookups. A training step is three times its
forward pass. Windows count the keys *before* the query, one less than `config.sliding_window`.
"""

from .configuration_nanochat import NanoChatConfig
from .configuration_nanochat_turbo import NanoChatTurboConfig
from .modeling_nanochat_turbo import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS
from .softcapped_loss import affordable_chunk

FLOAT32 = 4  # bytes
LOSS_BYTES_PER_LOGIT = 12  # of a chunk: float32 tanh and exponentials, its and the previous chunk's gradient
# Muon's, per parameter of the largest stack of matrices: float32 updates, and products in the iteration's dtype.
MUON_WORK_BYTES = 12


def parameter_counts(config: NanoChatConfig) -> dict[str, int]:
    """Parameters by group, and their `total`; a group that the architecture lacks is 0.

    `wte` is the token embedding, `transformer_matrices` every matrix in the layers (the gates of value embeddings
    included), `scalars` the rest: scales, the smear gate, biases if any.
    """
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    counts = {
        "wte": config.vocab_size * config.hidden_size,
        "value_embeds": len(value_embedding_layers(config)) * config.vocab_size * key_value_width(config),
        "lm_head": head,
        "transformer_matrices": layer_matrices(config),
        "scalars": scales(config) + smear_gate(config) + biases(config),
    }
    return counts | {"total": sum(counts.values())}


def scaling_parameters(config: NanoChatConfig) -> int:
    """Parameters that count in "tokens per parameter", the training horizon: layer matrices and head."""
    return layer_matrices(config) + config.vocab_size * config.hidden_size


def matmul_parameters(config: NanoChatConfig) -> int:
    """Weights that every token is multiplied with: all but embedding tables and scales."""
    return scaling_parameters(config) + smear_gate(config)


def window_sizes(config: NanoChatConfig) -> list[int]:
    """Maximum number of keys before the query in each layer; the full context without a sliding window."""
    return [config.max_position_embeddings if window is None else window for window in sliding_windows(config)]


def training_flops_per_token(config: NanoChatConfig, sequence_length: int | None = None) -> int:
    """FLOPs of forward and backward pass per token, in rows of `sequence_length` (default: the model's maximum).

    Attention is counted as if every query saw a full window: the usual convention, about twice what a causal kernel
    computes in full-attention layers.
    """
    length = config.max_position_embeddings if sequence_length is None else sequence_length
    return 6 * matmul_parameters(config) + 12 * query_width(config) * sum(keys_seen(config, length))


def decode_flops_per_token(config: NanoChatConfig, context: int) -> int:
    """FLOPs of one new token that attends to `context` keys, or to a layer's window of them."""
    return 2 * matmul_parameters(config) + 4 * query_width(config) * sum(keys_seen(config, context))


def prefill_flops(config: NanoChatConfig, length: int) -> int:
    """FLOPs of one forward pass over a prompt of `length` tokens; attention counts only causally visible keys."""
    pairs = sum(seen * (seen + 1) // 2 + (length - seen) * seen for seen in keys_seen(config, length))
    return 2 * matmul_parameters(config) * length + 4 * query_width(config) * pairs


def kv_bytes_per_token(config: NanoChatConfig, bytes_per_number: int) -> int:
    """Bytes of keys and values that each token adds to the cache, over all layers.

    Excludes the extra layer in which turbo's cache keeps the previous token.
    """
    return 2 * key_value_width(config) * bytes_per_number * config.num_hidden_layers


def kv_bytes_read_per_step(config: NanoChatConfig, context: int, bytes_per_number: int) -> int:
    """Bytes of keys and values read to decode one token of one row at `context`."""
    return 2 * key_value_width(config) * bytes_per_number * sum(keys_seen(config, context))


def decode_bytes_per_step(config: NanoChatConfig, context: int, batch_size: int, bytes_per_number: int) -> int:
    """Bytes read by one decoding step: every weight once, and each row's keys and values.

    Embedding rows are not counted: a few thousand numbers per token.
    """
    cache = batch_size * kv_bytes_read_per_step(config, context, bytes_per_number)
    return matmul_parameters(config) * bytes_per_number + cache


def training_bytes(
    config: NanoChatConfig,
    rows: int,
    length: int,
    *,
    compiled: bool = True,
    number_bytes: int = 2,
    processes: int = 1,
    accumulates: bool = True,
    memory: int = 80 * 2**30,
) -> dict[str, int]:
    """Bytes by kind on one device at the peak of a training step, and their `total`.

    Weights, gradients and optimizer state are float32. The allocator, CUDA's context and libraries need more on top.

    Args:
        rows, length: Shape of one pass.
        compiled: Whether torch.compile is used, which saves less for the backward pass.
        number_bytes: Bytes per number in matrix products: 2 under bfloat16 autocast, 4 in float32.
        processes: Ranks that the optimizer state is sharded over; weights and gradients are replicated.
        accumulates: Whether a step has several passes, so that gradients exist during the forward pass.
        memory: Device memory in bytes, from which the loss chooses its chunk size.
    """
    counts, tokens = parameter_counts(config), rows * length
    matrices, total = counts["transformer_matrices"], counts["total"]
    held = {"weights": FLOAT32 * total, "optimizer": FLOAT32 * (2 * total - matrices) // processes}
    gradients = FLOAT32 * total
    forward = {
        "gradients": gradients if accumulates else 0,
        "weights_cast": number_bytes * matmul_parameters(config) if number_bytes < FLOAT32 else 0,
        "activations": tokens * saved_bytes_per_token(config, number_bytes, compiled=compiled),
        "loss": loss_bytes(config, tokens, number_bytes, compiled=compiled, memory=memory),
    }
    update = {"gradients": gradients, "update": MUON_WORK_BYTES * largest_stack(config) // processes}
    kinds = held | max(forward, update, key=lambda part: sum(part.values()))
    return kinds | {"total": sum(kinds.values())}


def saved_bytes_per_token(config: NanoChatConfig, number_bytes: int, *, compiled: bool) -> int:
    """Bytes saved per token for the backward pass, in all layers and around them.

    Eager passes save the inputs of all norms in float32. The compiler recomputes those from the residual stream and
    from what attention and the products save anyway.
    """
    width, query, key_value = config.hidden_size, query_width(config), key_value_width(config)
    products = 2 * width + 3 * query + 2 * key_value + config.intermediate_size  # attention's output twice
    turbo = isinstance(config, NanoChatTurboConfig)
    norms = 2 * width + query + key_value
    per_layer = number_bytes * products
    per_layer += number_bytes * norms if compiled else FLOAT32 * norms
    per_layer += number_bytes * width if turbo else 0  # the residual stream before scaling
    tables = number_bytes * key_value * len(value_embedding_layers(config))
    around = (2 * FLOAT32 + 3 * number_bytes + (3 * number_bytes if turbo else 0)) * width
    return config.num_hidden_layers * per_layer + tables + around


def loss_bytes(config: NanoChatConfig, tokens: int, number_bytes: int, *, compiled: bool, memory: int) -> int:
    """Bytes of the chunked loss beside the activations: its chunks and the head's gradient."""
    logits = min(tokens * config.vocab_size, affordable_chunk(memory))
    per_logit = 3 * number_bytes if compiled else LOSS_BYTES_PER_LOGIT
    return per_logit * logits + FLOAT32 * config.vocab_size * config.hidden_size


def largest_stack(config: NanoChatConfig) -> int:
    """Parameters of the equally shaped matrices that Muon orthogonalises at once."""
    width = config.hidden_size
    square = (2 if config.num_key_value_heads < config.num_attention_heads else 4) * query_width(config) * width
    return config.num_hidden_layers * max(square, width * config.intermediate_size)


def sliding_windows(config: NanoChatConfig) -> list[int | None]:
    """Keys before the query in each layer; None where unlimited."""
    if not isinstance(config, NanoChatTurboConfig):
        return [None] * config.num_hidden_layers
    return [config.sliding_window - 1 if kind == "sliding_attention" else None for kind in config.layer_types]


def keys_seen(config: NanoChatConfig, context: int) -> list[int]:
    """Keys that a query sees in each layer if `context` keys are available."""
    return [context if window is None else min(window, context) for window in sliding_windows(config)]


def query_width(config: NanoChatConfig) -> int:
    return config.num_attention_heads * config.dim_of_heads


def key_value_width(config: NanoChatConfig) -> int:
    return config.num_key_value_heads * config.dim_of_heads


def value_embedding_layers(config: NanoChatConfig) -> list[int]:
    return config.value_embedding_layers if isinstance(config, NanoChatTurboConfig) else []


def layer_matrices(config: NanoChatConfig) -> int:
    attention = 2 * (query_width(config) + key_value_width(config)) * config.hidden_size
    mlp = 2 * config.hidden_size * config.intermediate_size
    gates = len(value_embedding_layers(config)) * config.num_key_value_heads * VALUE_GATE_CHANNELS
    return config.num_hidden_layers * (attention + mlp) + gates


def smear_gate(config: NanoChatConfig) -> int:
    return SMEAR_GATE_CHANNELS if isinstance(config, NanoChatTurboConfig) else 0


def scales(config: NanoChatConfig) -> int:
    """Number of turbo's scales: two per layer, and those of smear and backout."""
    return 2 * config.num_hidden_layers + 2 if isinstance(config, NanoChatTurboConfig) else 0


def biases(config: NanoChatConfig) -> int:
    """Number of biases of attention's four projections; 0 without `attention_bias`."""
    width = query_width(config) + 2 * key_value_width(config) + config.hidden_size
    return config.num_hidden_layers * width if config.attention_bias else 0
