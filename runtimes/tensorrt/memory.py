"""Whether a model fits a device, and where its weights go."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from cpm_edge.runtimes.cuda_runtime import size
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.tensorrt.device import Device

# Peak host memory of a build over the bytes of the weights: TensorRT-RTX 1.7.1, 24 layers of a 0.5B shape,
# 1.5 GB for 348 MB of int4, 3.4 GB for 873 MB of fp16.
BUILD_FACTOR = 4.3
# The CUDA context and the libraries; an assumption, not a measurement.
RESERVE = 300 << 20
# A build that holds no large weights: libraries, graph, kernels; rounded up.
WEIGHTLESS_BUILD = 1 << 30
_MOST_SCRATCH = 1 << 30
_FOR_THE_BUILD = (
    "Close other programs, or add swap for the build: sudo fallocate -l 8G /swapfile && "
    "sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
)


class Placement(enum.Enum):
    """Where the weights are: inside the engine, in device memory as inputs of the network, or in main memory,
    from where the engine streams them."""

    ENGINE = "engine"
    INPUTS = "inputs"
    STREAMED = "streamed"


@dataclass(frozen=True)
class Need:
    """Bytes a model takes: weights, caches and states of one session, activations and scratch of a step."""

    weights: int
    cache: int
    workspace: int

    @classmethod
    def of(cls, engine: dict[str, Any]) -> Need:
        """From the manifest's ``engine.memory``."""
        memory = engine["memory"]
        return cls(int(memory["weights"]), int(memory["kv_cache"]), int(memory["workspace"]))

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + RESERVE

    def __str__(self) -> str:
        return (
            f"{size(self.weights)} weights + {size(self.cache)} KV cache + {size(self.workspace)} workspace"
            f" + {size(RESERVE)} for CUDA = {size(self.total)}"
        )


def workspace_limit(need: Need, device: Device) -> int:
    """Bytes of scratch a layer may ask for: what the model was planned with, or up to 1 GiB that is left."""
    left = device.available - need.weights - need.cache
    return max(need.workspace, min(_MOST_SCRATCH, left))


def check_weightless(need: Need, as_inputs: int, device: Device) -> None:
    """Whether a build fits whose weights are inputs but for those that must lie inside.

    Args:
        as_inputs: bytes of weights that are inputs.

    Raises:
        BackendError: it does not; with the numbers.
    """
    inside = max(0, need.weights - as_inputs)
    wanted = WEIGHTLESS_BUILD + int(BUILD_FACTOR * inside) + need.workspace
    if wanted > device.host_available:
        raise BackendError(
            f"not enough free memory to build an engine on {device}: {size(wanted)}, with {size(as_inputs)} "
            f"of {size(need.weights)} weights kept out of it, {size(device.host_available)} are free",
            hint=_FOR_THE_BUILD,
        )


def check_run(need: Need, device: Device, placement: Placement = Placement.ENGINE) -> None:
    """Whether a session fits.

    Raises:
        BackendError: it does not; with the numbers.
    """
    on_device = need.total - (need.weights if placement is Placement.STREAMED else 0)
    if on_device > device.total:
        raise BackendError(
            f"the model does not fit {device}: it needs {need}",
            hint="Export with a smaller --max-context or --weight-format int4, or take a smaller model.",
        )
    if on_device > device.available:
        raise BackendError(
            f"not enough free memory on {device}: the model needs {need}, {size(device.available)} are free",
            hint="Close other programs (on a Jetson: sudo systemctl stop gdm, or boot without the desktop), "
            "or export with a smaller --max-context.",
        )


def choose_placement(need: Need, device: Device) -> Placement:
    """Where the weights of an engine that is to be built go.

    Inside the engine if both a build and a session fit. As network inputs if only the build is too large: the
    builder then never sees them. Streamed if device memory is too small for a session but main memory is not,
    on cards with a memory of their own: in shared memory a second copy would help nobody.

    Raises:
        BackendError: none of these fits; with the numbers.
    """
    fits_device = need.total <= device.available
    build = int(BUILD_FACTOR * need.weights) + need.workspace
    fits_build = build <= device.host_available
    without_weights = need.total - need.weights
    if not fits_device and not device.unified and fits_build and without_weights <= device.available:
        return Placement.STREAMED
    check_run(need, device)
    if fits_build:
        return Placement.ENGINE
    check_weightless(need, need.weights, device)
    return Placement.INPUTS
