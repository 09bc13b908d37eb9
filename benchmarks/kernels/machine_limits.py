"""What the machine reads and computes at most, sampled beside the measurements."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpm_edge.benchmarks.samples import Samples
from cpm_edge.plugins.probe import multiply_adds, read_bandwidth


@dataclass
class Limits:
    """Samples of a run.

    Attributes:
        bandwidth: bytes a second read from memory.
        multiply_adds: float32 multiply-adds a second, each of which is two operations.
    """

    threads: int
    bandwidth: Samples = field(default_factory=Samples)
    multiply_adds: Samples = field(default_factory=Samples)

    def sample(self) -> None:
        """Take one more of each."""
        self.bandwidth.add(read_bandwidth(self.threads, repeat=3))
        self.multiply_adds.add(multiply_adds(self.threads, repeat=2))

    @property
    def flops(self) -> float:
        """float32 operations a second."""
        return 2 * self.multiply_adds.median

    def note(self) -> str:
        return (
            f"{self.threads} threads read {self.bandwidth.median / 1e9:.1f} GB/s and do at most "
            f"{self.flops / 1e9:.0f} GFLOP/s in float32"
        )

    def to_json(self) -> dict[str, list[float]]:
        return {"bandwidth": self.bandwidth.values, "multiply_adds": self.multiply_adds.values}
