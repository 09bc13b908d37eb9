"""How much of their MLPs decode steps left out: models with a threshold on the gate (FATReLU, ReLU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MlpSparsity:
    """Sums over layers and tokens that were computed one by one.

    Attributes:
        neurons: that there are; active: whose gate passed the threshold.
        weight_bytes: of up and down projections; read_bytes: that were read, scales of whole groups included.
    """

    neurons: int
    active: int
    weight_bytes: int
    read_bytes: int

    @property
    def inactive_share(self) -> float:
        """Neurons whose gate was 0; 0 where nothing was counted."""
        return 1 - self.active / self.neurons if self.neurons else 0.0

    @property
    def read_share(self) -> float:
        """Of the bytes of up and down projections; 1 where nothing was counted."""
        return self.read_bytes / self.weight_bytes if self.weight_bytes else 1.0

    def since(self, earlier: MlpSparsity | None) -> MlpSparsity | None:
        """What came after an earlier count of the same session; None if nothing did."""
        if earlier is None:
            return self
        if self.neurons == earlier.neurons:
            return None
        return MlpSparsity(
            self.neurons - earlier.neurons,
            self.active - earlier.active,
            self.weight_bytes - earlier.weight_bytes,
            self.read_bytes - earlier.read_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        """The shares, JSON-ready."""
        return {"inactive_share": self.inactive_share, "read_share": self.read_share}

    def __str__(self) -> str:
        return (
            f"{self.inactive_share:.1%} of neurons inactive, "
            f"{self.read_share:.1%} of up and down projections read"
        )
