"""What a run is held against: the profile of the chip, and how fast memory is read while it lasts."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from cpm_edge.benchmarks.bundle.measure import Settings
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.plan import Chip, PlanError, detect
from cpm_edge.benchmarks.plan import chip as chip_called
from cpm_edge.benchmarks.plan.chip import Device
from cpm_edge.benchmarks.plan.detect import match, read_signs
from cpm_edge.benchmarks.plan.this_machine import THIS_MACHINE, cache_file, this_machine
from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.probe import read_bandwidth

UNKNOWN = "unknown"
SLOW = 0.85  # of a profile's bandwidth, or the other way round
DRIFT = 0.1  # of the bandwidth, from before to after a measurement, of which a report speaks


def find_chip(name: str, device: str) -> Chip:
    """The profile with this id; auto detects this machine, this-machine measures it.

    Args:
        device: that the run is on. The profile of auto has it, without a number where none is known.

    Raises:
        BenchError: there is no such profile, or the one that was asked for has no such device.
    """
    key = profile_device(device)
    try:
        if name == "auto":
            signs = read_signs()
            on_jetson = device == "CPU" and signs.boards  # whose profiles are of their GPUs
            found = this_machine(signs) if on_jetson else detect(nvidia=device == "cuda")
            return found if _has(found, device) else _unknown(found, key)
        found = this_machine(read_signs()) if name == THIS_MACHINE else chip_called(name)
    except PlanError as error:
        raise BenchError(error.message, hint=error.hint) from error
    find_device(found, device)
    return found


def _unknown(chip: Chip, device: str) -> Chip:
    """Of a device that no profile has: the chip's bandwidth may not be what it reads from."""
    nothing = Device(device, {"fp16": None, "int8": None})
    return replace(chip, id=UNKNOWN, name=f"unlisted {device}, {chip.name}", bandwidth=None,
                   devices={device: nothing}, detect={})  # fmt: skip


def profile_device(device: str) -> str:
    """The profile's name of what ``--device`` names; GPU.0 is OpenVINO's first GPU, the integrated one."""
    return "GPU" if device in ("cuda", "GPU.0") else device


def find_device(chip: Chip, device: str) -> Device:
    """The chip's engine that a run was on.

    Raises:
        BenchError: the chip has none of this kind.
    """
    if not _has(chip, device):
        raise BenchError(
            f"--chip {chip.id}: expected a chip whose profile has a {device}, which this run uses; it is for "
            f"--target {chip.target} and has {', '.join(chip.devices)}",
            hint="leave --chip out, or pass another --device",
        )
    return chip.devices[profile_device(device)]


def _has(chip: Chip, device: str) -> bool:
    """A profile's GPU is an NVIDIA one or Intel's, never both."""
    if profile_device(device) not in chip.devices:
        return False
    return device == "CPU" or chip.id == UNKNOWN or (chip.kind in ("jetson", "rtx")) == (device == "cuda")


def another_chip(chip: Chip, device: str) -> list[str]:
    """Said where this machine does not look like the chip that it is compared with."""
    if not any(chip.detect.values()):
        return []
    signs = read_signs()
    found = match(signs if device == "cuda" else replace(signs, gpus=()))
    if found is not None and found.id == chip.id:
        return []
    seen = found.name if found else signs.processor or "another one"
    return [
        f"predictions and published runs are for {chip.name}, but this machine's chip seems to be {seen}: "
        "leave --chip out for its own"
    ]


def crowded(settings: Settings) -> list[str]:
    """Said where threads wait for each other's core."""
    cores = os.cpu_count() or 1
    if not settings.threads or settings.threads <= cores:
        return []
    return [f"{settings.threads} threads on {cores} cores: fewer are faster"]


def bandwidth_now(settings: Settings) -> float:
    """Bytes a second; 0 where this process cannot measure what the device reads."""
    if settings.device != "CPU":
        return 0.0
    try:
        return read_bandwidth(settings.threads or os.cpu_count() or 1)
    except NativeError:
        return 0.0


def roofline(chip: Chip, bandwidths: list[float]) -> dict[str, Any]:
    """Read bandwidth on the CPU, the mean of before and after the measurement; the chip's peak elsewhere."""
    if all(bandwidths):
        source = "reads of 1 GiB before and after the measurement"
        return {"bandwidth": sum(bandwidths) / len(bandwidths), "source": source}
    if chip.bandwidth is None:
        return {"bandwidth": None, "source": "unverified"}
    return {"bandwidth": chip.bandwidth.value, "source": chip.bandwidth.source}


def drift(bandwidths: list[float]) -> list[str]:
    """Said where the machine changed meanwhile, as virtual ones do: one run's spread is then too small."""
    low, high = min(bandwidths), max(bandwidths)
    if not low or high - low <= DRIFT * high:
        return []
    before, after = (f"{each / 1e9:.1f}" for each in bandwidths)
    return [
        f"memory was read at {before} GB/s before the measurement and at {after} after it: "
        "this machine's speed changes, and another run may differ by more than the spread"
    ]


def other_memory(now: float | None, chip: Chip, settings: Settings) -> list[str]:
    """Said where predictions are for a machine that is faster or slower than this one is now."""
    known = chip.bandwidth
    if settings.device != "CPU" or not now or known is None or SLOW < now / known.value < 1 / SLOW:
        return []
    can_repeat = chip.id == THIS_MACHINE and not settings.threads  # fewer threads read less
    again = f"; remove {cache_file(read_signs())} to measure it again" if can_repeat else ""
    return [
        f"memory was read at {now / 1e9:.1f} GB/s in this run, the chip's profile says "
        f"{known.value / 1e9:.1f}: predictions are for the latter{again}"
    ]
