"""A key-value cache whose rows all end at the same column, so that rows may leave and others may enter.

A row of n tokens occupies the last n columns; what stands before them is masked. Every row writes its next token to
the same column, in place, and rotary positions are in the keys already, so a row can be moved to other columns as it
is.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


class FrameLayer(CacheLayerMixin):
    """Keys and values (rows, heads, capacity, head_dim) of one layer.

    Args:
        frame: The cache; its bounds are those of every layer.
        window: Tokens that the layer's attention sees, the current one included; None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, frame: "Frame", window: int | None):
        super().__init__()
        self.frame, self.window = frame, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self.room_for(key_states), self.room_for(value_states)
        self.is_initialized = True

    def room_for(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, _, head_dim = states.shape
        # Zeros, because a masked column still counts 0 times its value, and uninitialized memory may hold NaN.
        return states.new_zeros(rows, heads, self.frame.capacity, head_dim)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.frame.length + key_states.shape[2]
        self.keys[:, :, self.frame.length : end] = key_states
        self.values[:, :, self.frame.length : end] = value_states
        begin = self.begin(key_states.shape[2])
        return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def begin(self, query_length: int) -> int:
        """The first column that the next `query_length` tokens read."""
        if self.window is None or query_length > 1:
            return 0
        return max(0, self.frame.length + 1 - self.window)

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        begin = self.begin(query_length)
        return self.frame.length + query_length - begin, begin

    def get_seq_length(self) -> int:
        return self.frame.length

    def get_max_length(self) -> int:
        return -1


class Frame(Cache):
    """See the module's docstring. `length` counts the columns in use; the caller adds to it after each forward pass.

    Args:
        config: The model's.
        capacity: Columns.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int):
        decoder = config.get_text_config(decoder=True)
        kinds = getattr(decoder, "layer_types", None) or [None] * decoder.num_hidden_layers
        # Window of each kind of layer, None for full attention; empty if the model knows only one kind
        self.windows = {
            kind: decoder.sliding_window if kind == "sliding_attention" else None for kind in kinds if kind is not None
        }
        self.parts = [FrameLayer(self, self.windows.get(kind)) for kind in kinds]
        super().__init__(layers=[*self.parts])
        self.config, self.capacity, self.length = config, capacity, 0


def arrange(sources: Sequence[tuple[Frame, Sequence[int]]], longest: int, capacity: int) -> Frame:
    """A new frame with the chosen rows of each source, which may repeat, one source below the other.

    Args:
        longest: Tokens of the longest row.
        capacity: Columns of the new frame, at least `longest`.
    """
    frame = Frame(sources[0][0].config, capacity)
    frame.length = longest
    for i, layer in enumerate(frame.parts):
        olds = [(source.parts[i], source.length, rows) for source, rows in sources]
        layer.keys = aligned([(old.keys, length, rows) for old, length, rows in olds], longest, capacity)
        layer.values = aligned([(old.values, length, rows) for old, length, rows in olds], longest, capacity)
        layer.is_initialized = True
    return frame


def aligned(sources: Sequence[tuple[torch.Tensor, int, Sequence[int]]], longest: int, capacity: int) -> torch.Tensor:
    """Chosen rows of tensors (rows, heads, columns, head_dim), each moved from its length to end at `longest`."""
    _, heads, _, head_dim = sources[0][0].shape
    result = sources[0][0].new_zeros(sum(len(rows) for _, _, rows in sources), heads, capacity, head_dim)
    first = 0
    for states, length, rows in sources:
        width, last = min(length, longest), first + len(rows)
        index = torch.tensor(list(rows), dtype=torch.long, device=states.device)
        result[first:last, :, longest - width : longest] = states[:, :, length - width : length][index]
        first = last
    return result
