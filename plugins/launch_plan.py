"""What an op launches, in order and with which arguments, as data.

The op's Python knows its kernels; a plugin on the device executes a plan without knowing the op. Everything
but the number of rows is fixed when an engine is built (heads, cache capacity, blocks), so a plan has one
symbol, ``ROWS``: the product of all dimensions but the last of input 0. What changes between launches of the
same shape, like the position, is read by kernels from device memory.

JSON form (``to_json``), the value of a plugin node's attribute ``plan``:
``version`` (1); ``workspace``, a list of ``name``, ``unit`` and ``divisors``: unit * product of
ceil(rows / divisor) bytes, each buffer beginning at a multiple of 256; ``variants``, of which the first with
``rows_up_to`` null or at least the number of rows applies: its ``launches`` have the ``kernel``'s name in
``index.json`` and ``arguments`` by parameter: ``"input:0"``, ``"output:0"``, ``"workspace:NAME"``,
``"rows"``, or a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal

from cpm_edge.plugins.kernel_config import ALIGNMENT, KernelConfig, Parameter

VERSION = 1
WORKSPACE_ALIGNMENT = 256
ROWS: Final = "rows"


@dataclass(frozen=True)
class Buffer:
    """Device memory that a launch is given: an input or output of the op by index, or a workspace by name."""

    kind: Literal["input", "output", "workspace"]
    key: int | str

    def __str__(self) -> str:
        return f"{self.kind}:{self.key}"


Argument = Buffer | Literal["rows"] | int | float


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of ``unit * product of ceil(rows / divisor)`` bytes; without divisors its size is fixed.

    Raises:
        ValueError: a size or divisor below 1.
    """

    name: str
    unit: int
    divisors: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if min(self.unit, *self.divisors, self.unit) < 1:
            raise ValueError(f"{self.name}: expected sizes of 1 or more, got {self.unit}, {self.divisors}")

    def nbytes(self, rows: int) -> int:
        return self.unit * prod(-(-rows // divisor) for divisor in self.divisors)


@dataclass(frozen=True)
class Launch:
    """One kernel and its run-time arguments by parameter.

    Raises:
        ValueError: a parameter without argument or of another type, an argument without parameter, or an
            integer that is not the multiple of 16 that the code relies on.
    """

    kernel: KernelConfig
    arguments: Mapping[str, Argument]

    def __post_init__(self) -> None:
        expected = [each.name for each in self.kernel.parameters]
        if sorted(expected) != sorted(self.arguments):
            raise ValueError(
                f"{self.kernel.name}: expected arguments {', '.join(expected)}, "
                f"got {', '.join(self.arguments)}"
            )
        for parameter in self.kernel.parameters:
            _check(self.kernel.name, parameter, self.arguments[parameter.name])

    def integers(self, rows: int) -> dict[str, int]:
        """Integer arguments for a number of rows: what the grid is made of."""
        names = [each.name for each in self.kernel.parameters if each.type == "i32"]
        return {name: rows if self.arguments[name] == ROWS else _int(self.arguments[name]) for name in names}

    def grid(self, rows: int) -> tuple[int, int, int]:
        return self.kernel.grid_of(self.integers(rows))


@dataclass(frozen=True)
class Variant:
    """Launches for up to so many rows; None for any number."""

    rows_up_to: int | None
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class LaunchPlan:
    """All variants of one op with its attributes and fixed sizes.

    Raises:
        ValueError: no variant for any number of rows at the end, limits that do not grow, or a workspace that
            is named twice, missing or unused.
    """

    variants: tuple[Variant, ...]
    workspaces: tuple[Workspace, ...] = ()

    def __post_init__(self) -> None:
        limits = [each.rows_up_to for each in self.variants]
        numbers = [limit for limit in limits[:-1] if limit is not None]
        if not limits or limits[-1] is not None or len(numbers) != len(limits) - 1:
            raise ValueError(f"variants: expected limits and then None, got {limits}")
        if numbers != sorted(set(numbers)):
            raise ValueError(f"variants: expected growing limits, got {numbers}")
        known = [each.name for each in self.workspaces]
        used = {
            each.key
            for launch in self.launches()
            for each in launch.arguments.values()
            if isinstance(each, Buffer) and each.kind == "workspace"
        }
        if len(known) != len(set(known)) or set(known) != used:
            raise ValueError(f"workspaces: expected {sorted(map(str, used))}, got {sorted(known)}")

    def variant(self, rows: int) -> Variant:
        """The one that applies to a number of rows, 1 or more."""
        return next(each for each in self.variants if each.rows_up_to is None or rows <= each.rows_up_to)

    def launches(self) -> list[Launch]:
        """Of all variants."""
        return [launch for variant in self.variants for launch in variant.launches]

    def kernels(self) -> list[KernelConfig]:
        """Every kernel that is needed, once each, in order of use."""
        return list({launch.kernel.name: launch.kernel for launch in self.launches()}.values())

    def offsets(self, rows: int) -> dict[str, int]:
        """Where each workspace begins, in bytes, and under "" where the last one ends."""
        found: dict[str, int] = {}
        end = 0
        for each in self.workspaces:
            found[each.name] = end
            end += -(-each.nbytes(rows) // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        return found | {"": end}

    def workspace_bytes(self, rows: int) -> int:
        return self.offsets(rows)[""]

    def to_json(self) -> str:
        """The text of the module's docstring; equal plans give equal text."""
        return json.dumps(
            {
                "version": VERSION,
                "workspace": [
                    {"name": each.name, "unit": each.unit, "divisors": list(each.divisors)}
                    for each in self.workspaces
                ],
                "variants": [_variant(each) for each in self.variants],
            },
            separators=(",", ":"),
        )


def inputs(*names: str) -> dict[str, Argument]:
    """Arguments for the op's inputs in order; an empty name passes over one."""
    return {name: Buffer("input", index) for index, name in enumerate(names) if name}


def outputs(*names: str) -> dict[str, Argument]:
    """Arguments for the op's outputs in order; an empty name passes over one."""
    return {name: Buffer("output", index) for index, name in enumerate(names) if name}


def workspaces(*names: str) -> dict[str, Argument]:
    """Arguments for scratch buffers that are named like the parameters."""
    return {name: Buffer("workspace", name) for name in names}


def distinct(plans: Sequence[LaunchPlan]) -> list[KernelConfig]:
    """The kernels of several plans by name.

    Raises:
        ValueError: two kernels of one name differ.
    """
    found: dict[str, KernelConfig] = {}
    for kernel in (kernel for plan in plans for kernel in plan.kernels()):
        if found.setdefault(kernel.name, kernel) != kernel:
            raise ValueError(f"{kernel.name}: expected one configuration of this name, got two")
    return [found[name] for name in sorted(found)]


def _variant(variant: Variant) -> dict[str, Any]:
    launches = [
        {
            "kernel": launch.kernel.name,
            "arguments": {
                name: str(value) if isinstance(value, Buffer) else value
                for name, value in launch.arguments.items()
            },
        }
        for launch in variant.launches
    ]
    return {"rows_up_to": variant.rows_up_to, "launches": launches}


def _check(kernel: str, parameter: Parameter, value: Argument) -> None:
    name = f"{kernel}: {parameter.name}"
    if parameter.type.startswith("*"):
        if not isinstance(value, Buffer):
            raise ValueError(f"{name}: expected a buffer, got {value!r}")
    elif parameter.type == "fp32":
        if not isinstance(value, float):
            raise ValueError(f"{name}: expected a float, got {value!r}")
    elif value != ROWS and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name}: expected an integer or rows, got {value!r}")
    elif parameter.aligned and (value == ROWS or _int(value) % ALIGNMENT):
        raise ValueError(f"{name}: expected a multiple of {ALIGNMENT}, got {value!r}")


def _int(value: Argument) -> int:
    assert isinstance(value, int)
    return value
