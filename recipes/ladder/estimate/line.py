"""One line of the plan, and the model that the lines are about."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from modeling_nanochat import NanoChatConfig
from modeling_nanochat.sizes import parameter_counts

START_SECONDS = 60  # assumed: loading and compiling before the first step


@dataclass(frozen=True)
class Estimate:
    """One line of the plan.

    Attributes:
        batch: Rows, passes, devices.
        memory: Bytes at the peak of a device.
        kept: Bytes on the disk afterwards.
        passing: Bytes that are on the disk during the step only.
        seconds: By what takes them.
        notes: What the user should know or set.
    """

    name: str
    steps: int = 0
    tokens: float = 0
    flops: float = 0
    batch: tuple[int, int, int] | None = None
    memory: float = 0
    kept: float = 0
    passing: float = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A model that a stage will have trained: its sizes, and the settings that midtraining inherits."""

    config: NanoChatConfig
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return 4 * parameter_counts(self.config)["total"]

    @property
    def checkpoint(self) -> int:
        """Bytes of weights and optimizer state."""
        counts = parameter_counts(self.config)
        return 4 * (3 * counts["total"] - counts["transformer_matrices"])
