"""The GPU that is measured, and what it can do at most."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.runtimes.errors import missing_dependency

# float16 multiply-adds with float32 sums, dense, a clock and multiprocessor, by compute capability: NVIDIA's
# white papers of A100, GA102, Ada, H100 and RTX Blackwell; of Orin and Thor from their published TOPS.
# Of 8.6, 8.9 and 12.0 those of GeForce; professional cards of the same chips do up to twice as many.
TENSOR = {80: 1024, 86: 256, 87: 1024, 89: 256, 90: 2048, 110: 4096, 120: 256}


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        sm: compute capability times ten.
        bandwidth: bytes a second, from the memory's clock and bus; None where the driver does not say.
        tensor: float16 operations a second of the tensor cores; None for an unknown compute capability.
    """

    name: str
    sm: int
    bandwidth: float | None
    tensor: float | None

    @classmethod
    def of(cls, name: str, sm: int, attributes: dict[str, int]) -> Card:
        """From the driver's attributes: clocks in kHz, the bus in bits; memory moves data twice a clock."""
        bytes_a_clock = 2 * attributes["mem_bus_width"] // 8
        bandwidth = 1e3 * attributes["mem_clock_rate"] * bytes_a_clock or None
        clocks = 1e3 * attributes["sm_clock_rate"] * attributes["multiprocessor_count"]
        return cls(name, sm, bandwidth, 2 * TENSOR[sm] * clocks if sm in TENSOR else None)

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def find_card() -> Card:
    """The first GPU.

    Raises:
        BackendError: triton is not installed.
        BenchError: no GPU, or a torch that cannot use it.
    """
    if find_spec("triton") is None:
        raise missing_dependency("triton", "jetson-export")
    if not torch.cuda.is_available():
        raise _no_gpu()
    from triton.runtime import driver

    major, minor = torch.cuda.get_device_capability(0)
    attributes = driver.active.utils.get_device_properties(0)
    return Card.of(torch.cuda.get_device_name(0), 10 * major + minor, attributes)


def _no_gpu() -> BenchError:
    wanted = "gpu-check: expected an NVIDIA GPU and a CUDA build of torch"
    if torch.version.cuda is None:
        return BenchError(
            f"{wanted}, got torch {torch.__version__} without CUDA",
            hint="where there is a GPU: pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    return BenchError(
        f"{wanted}, got torch {torch.__version__}, which finds no GPU",
        hint="run it on a machine where nvidia-smi shows a GPU",
    )
