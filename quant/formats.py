"""How a weight matrix is stored: its number format, its groups, and the quantized form in memory."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError

GROUP_SIZES = (32, 64, 128)
"""Columns that may share one int4 scale."""


class WeightFormat(str, enum.Enum):
    """The number format of stored weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    TERNARY = "ternary"

    @property
    def bits(self) -> int:
        """Bits of one stored weight, scales not counted."""
        return _BITS[self]

    @property
    def is_float(self) -> bool:
        """True for the formats that have no scales."""
        return self not in _INTEGERS


_BITS = {
    WeightFormat.FP32: 32,
    WeightFormat.FP16: 16,
    WeightFormat.BF16: 16,
    WeightFormat.INT8: 8,
    WeightFormat.INT4: 4,
    WeightFormat.TERNARY: 2,
}
_INTEGERS = (WeightFormat.INT8, WeightFormat.INT4, WeightFormat.TERNARY)


@dataclass(frozen=True)
class Scheme:
    """One way to store a matrix.

    Args:
        format: the number format.
        group_size: neighbouring columns that share a scale; None is one scale per row.
        symmetric: the zero point is fixed (``zero_code``) instead of stored per group.
        wide_scales: the scales are float32, because float16 does not hold all of them exactly; only for
            integers that a checkpoint brings (ternary, int4), since ours are chosen so that it holds them.

    Raises:
        QuantError: the three do not go together.
    """

    format: WeightFormat
    group_size: int | None = None
    symmetric: bool = True
    wide_scales: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise QuantError(f"group size: expected a positive number of columns, got {self.group_size}")
        if self.format.is_float and self.group_size is not None:
            raise QuantError(
                f"{self.format.value} has no scales, so group size {self.group_size} means nothing",
                hint="leave the group size out, or choose int4",
            )
        if self.format is not WeightFormat.INT4 and not self.symmetric:
            raise QuantError(
                f"asymmetric {self.format.value} is not supported, only asymmetric int4",
                hint="leave asymmetric out, or choose int4",
            )
        if self.wide_scales and self.format not in (WeightFormat.TERNARY, WeightFormat.INT4):
            raise QuantError(f"{self.format.value} scales are float16: they are chosen so that it holds them")

    @property
    def bits(self) -> int:
        """Bits of one stored weight, scales not counted."""
        return self.format.bits

    def describe(self) -> str:
        """A short name for reports: ``int4 g32 sym``, ``int8 row sym``, ``ternary g128``, ``bf16``."""
        if self.format.is_float:
            return self.format.value
        group = "row" if self.group_size is None else f"g{self.group_size}"
        wide = " with float32 scales" if self.wide_scales else ""
        if self.format is WeightFormat.TERNARY:
            return f"ternary {group}{wide}"
        return f"{self.format.value} {group} {'sym' if self.symmetric else 'asym'}{wide}"

    def to_json(self) -> dict[str, object]:
        """Its fields, for ``scheme_from_json``."""
        return {**dataclasses.asdict(self), "format": self.format.value}

    def groups(self, cols: int) -> int:
        """Scales that a row of ``cols`` weights has.

        Raises:
            QuantError: the group size does not divide ``cols``.
        """
        if self.format.is_float:
            return 0
        if self.group_size is None:
            return 1
        if cols % self.group_size:
            raise QuantError(
                f"{cols} columns cannot be split into groups of {self.group_size}",
                hint="fit_group() picks a group size that divides the columns",
            )
        return cols // self.group_size

    def bytes_for(self, rows: int, cols: int) -> int:
        """Exact packed size in bytes: codes, scales, and zero points two to a byte per row.

        Raises:
            QuantError: the columns do not divide into groups, or a row ends within a byte.
        """
        if cols * self.bits % 8:
            packed = 8 // self.bits
            raise QuantError(
                f"{self.format.value} packs {packed} columns into a byte: expected a multiple of {packed} "
                f"columns, got {cols}"
            )
        groups = self.groups(cols)
        zeros = 0 if self.symmetric else (groups + 1) // 2
        return rows * (cols * self.bits // 8 + (4 if self.wide_scales else 2) * groups + zeros)


def scheme_from_json(fields: Mapping[str, Any]) -> Scheme:
    """The scheme whose ``to_json`` gave these fields."""
    return Scheme(**{**fields, "format": WeightFormat(fields["format"])})


def fit_group(cols: int, requested: int) -> int:
    """The requested group size, or the next smaller one of GROUP_SIZES that divides ``cols``.

    Raises:
        QuantError: ``requested`` is not one of GROUP_SIZES, or none of them fits.
    """
    if requested not in GROUP_SIZES:
        raise QuantError(f"group size: expected one of {', '.join(map(str, GROUP_SIZES))}, got {requested}")
    for size in sorted(GROUP_SIZES, reverse=True):
        if size <= requested and cols % size == 0 and cols > 0:
            return size
    raise QuantError(
        f"{cols} columns are divided by no group size up to {requested} ({GROUP_SIZES[0]} is the smallest)",
        hint="store this tensor as int8, which has one scale per row",
    )


@dataclass
class Quantized:
    """A matrix, or a block of its rows, in integer codes; weight = (code - zero) * scale.

    Args:
        codes: uint8 (rows, cols), one code a byte, 0 .. 2**bits - 1.
        scales: float32 (rows, groups), each a value that float16 holds exactly unless the scheme has wide
            scales; may be negative.
        zeros: uint8 (rows, groups), or None when symmetric: the zero point is ``zero_code``.
        scheme: the format, group size and symmetry.

    Raises:
        QuantError: the arrays do not fit each other or the scheme.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.scheme.format.is_float:
            raise QuantError(f"{self.scheme.format.value} weights have no integer codes")
        if self.codes.dtype != np.uint8 or self.codes.ndim != 2:
            raise QuantError(f"codes: expected uint8 (rows, cols), got {_spec(self.codes)}")
        rows, cols = self.codes.shape
        shape = (rows, self.scheme.groups(cols))
        if self.scales.dtype != np.float32 or self.scales.shape != shape:
            raise QuantError(f"scales: expected float32 {shape}, got {_spec(self.scales)}")
        if (self.zeros is None) != self.scheme.symmetric:
            given = "none" if self.zeros is None else "some"
            raise QuantError(f"zero points: {self.scheme.describe()} was given {given}")
        if self.zeros is not None and (self.zeros.dtype != np.uint8 or self.zeros.shape != shape):
            raise QuantError(f"zero points: expected uint8 {shape}, got {_spec(self.zeros)}")

    @property
    def group_width(self) -> int:
        """Columns that share a scale; the whole row when the scheme is per row."""
        return self.scheme.group_size or int(self.codes.shape[1])

    @property
    def zero_code(self) -> int:
        """The code of weight 0 in a symmetric scheme: 1 for ternary, else 2**(bits-1)."""
        return 1 if self.scheme.format is WeightFormat.TERNARY else 1 << (self.scheme.bits - 1)

    def zero_points(self) -> npt.NDArray[np.uint8]:
        """The zero point of every group, uint8 (rows, groups), stored or not."""
        if self.zeros is not None:
            return self.zeros
        return np.full(self.scales.shape, self.zero_code, np.uint8)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weights that the codes stand for, float32 (rows, cols)."""
        rows, cols = self.codes.shape
        weight = self.codes.astype(np.float32).reshape(rows, self.scales.shape[1], self.group_width)
        if self.zeros is None:
            weight -= np.float32(self.zero_code)
        else:
            weight -= self.zeros[:, :, None]
        weight *= self.scales[:, :, None]
        return weight.reshape(rows, cols)


def _spec(array: npt.NDArray[np.generic]) -> str:
    return f"{array.dtype} {array.shape}"
