"""What is known about a chip: numbers with their sources, read from a checked JSON file.

A number that nobody could verify is null in the file and None here; whatever prints it says "unverified".
`parse_chip` is the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.plan.errors import PlanError

SCHEMA = 1
KINDS = ("jetson", "rtx", "aipc", "cpu")
DEVICES = ("GPU", "CPU", "NPU")
TARGETS = {"jetson": "jetson", "rtx": "rtx", "aipc": "aipc", "cpu": "aipc"}
_DETECT = ("device_tree", "cpu_name", "nvidia_smi")


@dataclass(frozen=True)
class Number:
    """A value in SI units (bytes, bytes a second, operations a second, watts) and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Roofline:
    """What a decode step takes: ``bytes / bandwidth + layers * layer`` seconds.

    Attributes:
        bandwidth: bytes a second that an engine reaches.
        layer: seconds a layer that no byte explains: launches, small operators.
        spread: half width of the printed interval, as a share of the speed.
        source: the runs that both were fitted to.
    """

    bandwidth: float
    layer: float
    spread: float
    source: str

    def text(self) -> str:
        return f"{self.bandwidth / 1e9:.4g} GB/s, {self.layer * 1e6:.4g} us a layer, +-{self.spread:.0%}"


@dataclass(frozen=True)
class Prefill:
    """What a prompt takes: ``operations / rate + layers * layer`` seconds; the rest as for decode."""

    rate: float
    layer: float
    spread: float
    source: str

    def text(self) -> str:
        return f"{self.rate / 1e12:.4g} TFLOPS, {self.layer * 1e6:.4g} us a layer, +-{self.spread:.0%}"


@dataclass(frozen=True)
class Device:
    """One engine of a chip: GPU, CPU or NPU.

    Attributes:
        peaks: dense operations a second by type; a multiplication and an addition are two.
        roofline, prefill: constants of published or measured runs; None where there are none.
    """

    name: str
    peaks: Mapping[str, Number | None]
    roofline: Roofline | None = None
    prefill: Prefill | None = None


@dataclass(frozen=True)
class Chip:
    """A chip, or a machine around one.

    Attributes:
        id: what ``--chip`` takes.
        kind: one of KINDS.
        sm: CUDA compute capability times ten; None without a CUDA GPU.
        memory: bytes that the engine can address; None where machines differ.
        reserved: share of ``memory`` that the system keeps.
        bandwidth: peak of the memory, bytes a second.
        power_modes: the lowest and highest, or all, watts; ``power_source`` is where they are from.
        devices: by OpenVINO's names; the first is the default.
        detect: what the chip is recognised by.
    """

    id: str
    name: str
    kind: str
    sm: int | None
    memory: Number | None
    reserved: Number
    bandwidth: Number | None
    power_modes: tuple[float, ...]
    power_source: str
    devices: Mapping[str, Device]
    detect: Mapping[str, tuple[str, ...]]

    @property
    def target(self) -> str:
        """The export target for it."""
        return TARGETS[self.kind]

    @property
    def memory_bytes(self) -> int | None:
        return int(self.memory.value) if self.memory else None

    @property
    def usable_bytes(self) -> int | None:
        """Memory without the reserved share."""
        return int(self.memory.value * (1 - self.reserved.value)) if self.memory else None


def read_chip(path: Path) -> Chip:
    """Read and check one profile.

    Raises:
        PlanError: not JSON, or a key that is missing, unknown or of another type than the schema's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path.name}: expected a chip profile in JSON: {error}") from error
    return parse_chip(content, path.name)


def parse_chip(content: Any, where: str) -> Chip:
    """The same from a parsed JSON document; ``where`` names it in errors."""
    reader = _Reader(where)
    keys = {"schema", "id", "name", "kind", "sm", "memory", "reserved", "bandwidth", "power_modes", "devices",
            "detect"}  # fmt: skip
    chip = reader.table(content, "", keys)
    if chip["schema"] != SCHEMA:
        raise PlanError(f"{where}: schema: expected {SCHEMA}, got {chip['schema']!r}")
    watts = chip["power_modes"]
    reserved = reader.number(chip["reserved"], "reserved", most=0.9)
    if reserved is None:
        raise reader.wrong("reserved", "a number with its source", None)
    devices = reader.table(chip["devices"], "devices", set(), set(DEVICES))
    if not devices:
        raise reader.wrong("devices", "at least one", devices)
    return Chip(
        id=reader.text(chip["id"], "id", r"[a-z0-9][a-z0-9.-]*"),
        name=reader.text(chip["name"], "name"),
        kind=reader.text(chip["kind"], "kind", "|".join(KINDS)),
        sm=reader.optional(chip["sm"], "sm", int),
        memory=reader.number(chip["memory"], "memory"),
        reserved=reserved,
        bandwidth=reader.number(chip["bandwidth"], "bandwidth"),
        power_modes=() if watts is None else reader.watts(watts),
        power_source="" if watts is None else str(watts["source"]),
        devices={name: _device(reader, entry, f"devices.{name}") for name, entry in devices.items()},
        detect={
            key: reader.texts(value, f"detect.{key}")
            for key, value in reader.table(chip["detect"], "detect", set(), set(_DETECT)).items()
        },
    )


def _device(reader: _Reader, content: Any, where: str) -> Device:
    entry = reader.table(content, where, {"name", "fp16", "int8", "roofline", "prefill"})
    rate = _constants(reader, entry["roofline"], f"{where}.roofline", "bandwidth")
    prompt = _constants(reader, entry["prefill"], f"{where}.prefill", "rate")
    roofline = Roofline(*rate) if rate else None
    prefill = Prefill(*prompt) if prompt else None
    peaks = {key: reader.number(entry[key], f"{where}.{key}") for key in ("fp16", "int8")}
    return Device(reader.text(entry["name"], f"{where}.name"), peaks, roofline, prefill)


def _constants(reader: _Reader, value: Any, at: str, rate: str) -> tuple[float, float, float, str] | None:
    if value is None:
        return None
    fields = reader.table(value, at, {rate, "layer", "spread", "source"})
    return (
        reader.positive(fields[rate], f"{at}.{rate}"),
        reader.positive(fields["layer"], f"{at}.layer", zero=True),
        reader.positive(fields["spread"], f"{at}.spread", most=1),
        reader.text(fields["source"], f"{at}.source"),
    )


class _Reader:
    """Checks values and names the key in what it raises."""

    def __init__(self, where: str) -> None:
        self.where = where

    def wrong(self, key: str, expected: str, got: Any) -> PlanError:
        return PlanError(f"{self.where}: {key or 'file'}: expected {expected}, got {got!r}")

    def table(
        self, value: Any, key: str, needed: set[str], allowed: set[str] | None = None
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        missing, unknown = needed - value.keys(), value.keys() - needed - (allowed or set())
        if missing or unknown:
            word = f"key {min(missing)!r}" if missing else f"no key {min(unknown)!r}"
            raise self.wrong(key, word, sorted(value))
        return value

    def text(self, value: Any, key: str, pattern: str = r"\S[\s\S]*") -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.wrong(key, f"text like {pattern}" if pattern != r"\S[\s\S]*" else "text", value)
        return value

    def texts(self, value: Any, key: str) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise self.wrong(key, "a list of texts", value)
        return tuple(self.text(each, key) for each in value)

    def optional(self, value: Any, key: str, kind: Callable[..., int]) -> int | None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise self.wrong(key, f"null or {kind.__name__} above 0", value)

    def positive(self, value: Any, key: str, *, most: float = float("inf"), zero: bool = False) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "a number", value)
        if not (value >= 0 if zero else value > 0) or value > most:
            raise self.wrong(key, f"a number above 0 up to {most:g}", value)
        return float(value)

    def number(self, value: Any, key: str, *, most: float = float("inf")) -> Number | None:
        if value is None:
            return None
        fields = self.table(value, key, {"value", "source"})
        return Number(
            self.positive(fields["value"], f"{key}.value", most=most),
            self.text(fields["source"], f"{key}.source"),
        )

    def watts(self, value: Any) -> tuple[float, ...]:
        fields = self.table(value, "power_modes", {"value", "source"})
        self.text(fields["source"], "power_modes.source")
        if not isinstance(fields["value"], list):
            raise self.wrong("power_modes.value", "a list of watts", fields["value"])
        return tuple(self.positive(each, "power_modes.value") for each in fields["value"])
