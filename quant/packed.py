"""What checkpoints of packed int4 share: nibbles in 32-bit words, group sizes, sound scales."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import GROUP_SIZES
from cpm_edge.quant.int4 import Bytes, pack_int4, unpack_int4
from cpm_edge.quant.scales import Floats, half_exact

Words = npt.NDArray[np.int32]

NIBBLES = 8
"""Codes in one 32-bit word."""


class Groups(NamedTuple):
    """How the groups of a checkpoint are stored here.

    Attributes:
        width: columns of a group as stored, one of GROUP_SIZES.
        repeat: how many of them a group of the checkpoint covers; each gets its scale and zero point.
    """

    width: int
    repeat: int


def nibbles(words: Words) -> Bytes:
    """The eight codes of every word, lowest bits first: int32 (n, m) to uint8 (n, 8 m).

    Raises:
        QuantError: not int32 (n, m).
    """
    if words.dtype != np.int32 or words.ndim != 2:
        raise QuantError(f"packed words: expected int32 with two axes, got {words.dtype} {words.shape}")
    little = np.ascontiguousarray(words, dtype="<i4")
    return unpack_int4(little.view(np.uint8), NIBBLES * words.shape[1])


def pack_nibbles(codes: Bytes) -> Words:
    """The inverse of ``nibbles``: uint8 (n, 8 m) codes 0..15 to int32 (n, m).

    Raises:
        QuantError: not uint8 with two axes, a code above 15, or a count that 8 does not divide.
    """
    if codes.ndim == 2 and codes.shape[1] % NIBBLES:
        raise QuantError(f"{NIBBLES} codes fill a word: expected a multiple of them, got {codes.shape[1]}")
    packed: Words = np.ascontiguousarray(pack_int4(codes)).view("<i4").astype(np.int32, copy=False)
    return packed


def stored_groups(cols: int, count: int) -> Groups:
    """Groups of one of GROUP_SIZES for ``cols`` columns that the checkpoint has in ``count`` groups.

    A larger group is split, its scale repeated, which changes no weight.

    Raises:
        QuantError: the groups are not equally wide, or no size here divides them.
    """
    if count < 1 or cols % count:
        raise QuantError(f"{cols} columns are not {count} groups of one width")
    width = cols // count
    for size in sorted(GROUP_SIZES, reverse=True):
        if width % size == 0:
            return Groups(size, width // size)
    raise QuantError(
        f"groups of {width} columns are not supported, expected a multiple of {GROUP_SIZES[0]}",
        hint="export the unquantized checkpoint and choose --weight-format int4",
    )


def check_scales(scales: Floats) -> bool:
    """Whether float16 holds all scales (rows, groups) exactly.

    Raises:
        QuantError: a scale is zero, NaN or infinite, with its row and group.
    """
    bad = ~np.isfinite(scales) | (scales == 0)
    if bad.any():
        row, group = (int(index) for index in np.argwhere(bad)[0])
        raise QuantError(
            f"has the scale {scales[row, group]} in group {group}, expected a finite number other than 0",
            hint="the checkpoint is damaged or its quantization failed; download it again",
            row=row,
        )
    return bool(half_exact(scales).all())
