"""How a Triton kernel is compiled and launched: what the interpreter, the compiler and a device share.

A plugin on the device knows no Python. Everything it must know to launch a kernel is therefore data here: the
parameters in order, the grid as a product of quotients of integer parameters, and what pointers promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

# Types of parameters, as Triton writes them; a star is a pointer to device memory.
POINTERS = ("*fp16", "*fp32", "*i32", "*i64", "*u8")
SCALARS = ("i32", "fp32")
ALIGNMENT = 16


@dataclass(frozen=True)
class Parameter:
    """One run-time argument.

    Attributes:
        type: of POINTERS or SCALARS.
        aligned: the address, or the integer, is a multiple of 16; the compiled code relies on it.

    Raises:
        ValueError: an unknown type, or an aligned float.
    """

    name: str
    type: str
    aligned: bool = False

    def __post_init__(self) -> None:
        if self.type not in POINTERS + SCALARS:
            raise ValueError(f"{self.name}: expected one of {', '.join(POINTERS + SCALARS)}, got {self.type}")
        if self.aligned and self.type == "fp32":
            raise ValueError(f"{self.name}: expected an aligned pointer or integer, got a float")


@dataclass(frozen=True)
class Quotient:
    """``ceil(parameter / divisor)`` of an integer parameter."""

    parameter: str
    divisor: int = 1


Axis = tuple[Quotient, ...]


@dataclass(frozen=True)
class KernelConfig:
    """One kernel in one tile configuration.

    Attributes:
        name: of the cubin, unique among all.
        module, function: where the ``triton.jit`` function is.
        parameters: run-time arguments, in order.
        constants: compile-time arguments by name.
        grid: x, y, z; an axis is the product of its quotients, 1 without any.
        warps, stages: Triton's num_warps and num_stages.

    Raises:
        ValueError: the grid names something that is not an integer parameter.
    """

    name: str
    module: str
    function: str
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, int | None]
    grid: tuple[Axis, Axis, Axis]
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        integers = {each.name for each in self.parameters if each.type == "i32"}
        for quotient in (quotient for axis in self.grid for quotient in axis):
            if quotient.parameter not in integers:
                raise ValueError(
                    f"{self.name}: grid: expected one of {', '.join(sorted(integers))}, "
                    f"got {quotient.parameter}"
                )

    def grid_of(self, values: Mapping[str, int]) -> tuple[int, int, int]:
        """The grid for these integer arguments."""
        x, y, z = (prod(-(-values[each.parameter] // each.divisor) for each in axis) for axis in self.grid)
        return x, y, z

    @property
    def signature(self) -> dict[str, str]:
        """Type of every argument by name, ``constexpr`` for constants, as Triton takes it."""
        types = {each.name: each.type for each in self.parameters}
        return types | dict.fromkeys(self.constants, "constexpr")

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> KernelConfig:
        """The inverse of ``to_json``, also after a way through JSON."""
        x, y, z = (tuple(Quotient(**each) for each in axis) for axis in value["grid"])
        parameters = tuple(Parameter(**each) for each in value["parameters"])
        return cls(**{**value, "parameters": parameters, "grid": (x, y, z)})
