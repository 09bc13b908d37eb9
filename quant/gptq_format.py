"""The tensors of GPTQ checkpoints (AutoGPTQ, GPTQModel), 4 bits: where each integer lies.

    qweight  int32 (cols / 8, rows)    nibble i of word [k, n] is the code of row n, column 8 k + i
    qzeros   int32 (groups, rows / 8)  nibble i of word [g, n] is the zero point of row 8 n + i; format "gptq"
                                       stores it less 1, "gptq_v2" as it is
    scales   (groups, rows)
    g_idx    int32 (cols,)             the group of each column (act order); else column // group size

weight = (code - zero) * scale. Words are little-endian, their lowest nibble first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.int4 import Bytes
from cpm_edge.quant.packed import Words, nibbles, pack_nibbles

Order = npt.NDArray[np.int64]


def unpack_gptq(qweight: Words) -> Bytes:
    """Codes uint8 (rows, cols) of qweight int32 (cols / 8, rows), or of some of its columns.

    Raises:
        QuantError: not int32 with two axes.
    """
    return nibbles(qweight.T)


def pack_gptq(codes: Bytes) -> Words:
    """qweight int32 (cols / 8, rows) of codes uint8 (rows, cols).

    Raises:
        QuantError: a number of columns that 8 does not divide, or a code above 15.
    """
    return np.ascontiguousarray(pack_nibbles(codes).T)


def pack_gptq_zeros(zeros: Bytes, *, less_one: bool) -> Words:
    """qzeros int32 (groups, rows / 8) of zero points uint8 (rows, groups).

    Raises:
        QuantError: a number of rows that 8 does not divide; a zero point 0 that is to be stored less 1.
    """
    if less_one and (none := zeros == 0).any():
        row, group = (int(index) for index in np.argwhere(none)[0])
        raise QuantError(
            f'has the zero point 0 in group {group}, and the format "gptq" stores it less 1',
            hint='"gptq_v2" stores zero points as they are',
            row=row,
        )
    return pack_nibbles(np.ascontiguousarray(zeros.T) - np.uint8(less_one))


def unpack_gptq_zeros(qzeros: Words, *, less_one: bool) -> Bytes:
    """Zero points uint8 (rows, groups) of qzeros int32 (groups, rows / 8).

    Args:
        less_one: they are stored less 1 (format "gptq").

    Raises:
        QuantError: not int32 with two axes; a stored 15 where 1 is to be added, with its row: readers of the
            format disagree on what it means (16, 0, or 0 with a carry into the next row).
    """
    zeros = np.ascontiguousarray(nibbles(qzeros).T)
    if not less_one:
        return zeros
    if (full := zeros == 15).any():
        row, group = (int(index) for index in np.argwhere(full)[0])
        raise QuantError(
            f"stores the zero point 15 in group {group}; the format adds 1 to it, and no 4-bit zero is 16",
            hint='save the checkpoint again in the format "gptq_v2", which stores zero points as they are',
            row=row,
        )
    return zeros + np.uint8(1)


def column_order(g_idx: npt.NDArray[np.integer], groups: int) -> Order | None:
    """The columns sorted by their group, each group's in ascending order; None if they are so already.

    Codes whose columns are put in this order have their groups side by side. The product stays the same when
    the activations are put in the same order.

    Args:
        g_idx: (cols,).
        groups: how many there are; they have one width.

    Raises:
        QuantError: a group that does not exist, or groups that are not equally wide.
    """
    cols = len(g_idx)
    if (outside := (g_idx < 0) | (g_idx >= groups)).any():
        column = int(np.argmax(outside))
        raise QuantError(f"expected groups within [0, {groups}), got {g_idx[column]} for column {column}")
    counts = np.bincount(g_idx, minlength=groups)
    if (wrong := counts * groups != cols).any():
        group = int(np.argmax(wrong))
        raise QuantError(
            f"group {group} has {counts[group]} of {cols} columns in {groups} groups of one width"
        )
    order: Order = np.argsort(g_idx, kind="stable")
    return None if np.array_equal(order, np.arange(cols)) else order
