"""The tensors of AWQ checkpoints, version GEMM, 4 bits: where each integer lies.

    qweight  int32 (cols, rows / 8)    word [k, n] holds the codes of column k, rows 8 n .. 8 n + 7
    qzeros   int32 (groups, rows / 8)  likewise the zero points, stored as they are
    scales   (groups, rows)

weight = (code - zero) * scale. Nibble i of a word, lowest first, belongs to row ORDER[i] of its eight.
"""

from __future__ import annotations

import numpy as np

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.int4 import Bytes
from cpm_edge.quant.packed import NIBBLES, Words, nibbles, pack_nibbles

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(values: Bytes) -> Words:
    """The inverse of ``unpack_awq``: uint8 (rows, n) to int32 (n, rows / 8).

    Raises:
        QuantError: a number of rows that 8 does not divide, or a value above 15.
    """
    if len(values) % NIBBLES:
        raise QuantError(
            f"AWQ packs {NIBBLES} rows into a word: expected a multiple of them, got {len(values)}"
        )
    eights = np.ascontiguousarray(values.T).reshape(values.shape[1], -1, NIBBLES)
    return pack_nibbles(eights[:, :, list(ORDER)].reshape(values.shape[1], -1))


def unpack_awq(words: Words) -> Bytes:
    """uint8 (rows, n) of int32 (n, rows / 8): codes of qweight (n columns) or zero points (n groups).

    Raises:
        QuantError: not int32 with two axes.
    """
    eights = nibbles(words).reshape(len(words), -1, NIBBLES)
    # Sorted by row, nibble i of row r is where ORDER has r.
    rows = eights[:, :, np.argsort(ORDER)].reshape(len(words), -1)
    return np.ascontiguousarray(rows.T)
