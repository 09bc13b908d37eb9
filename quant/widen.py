"""The same integers in more bits, for kernels that read several matrices as one."""

from __future__ import annotations

import numpy as np

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import Quantized
from cpm_edge.quant.int4 import Bytes


def widen(q: Quantized, bits: int, symmetric: bool) -> tuple[Bytes, Bytes | None]:
    """Codes (rows, cols) and zero points (rows, groups) or None; code - zero stays what it is, scales too.

    Args:
        bits: 2, 4 or 8, no fewer than the codes have. 8 holds all of int4 without zero points.
        symmetric: no zero points are stored: 1 for 2 bits, 2**(bits - 1) for more.

    Raises:
        QuantError: fewer bits, or zero points of int4 that symmetric int4 cannot express.
    """
    if bits < q.scheme.bits or (symmetric and bits == q.scheme.bits and q.zeros is not None):
        wanted = f"{bits} bits {'without' if symmetric else 'with'} zero points"
        raise QuantError(f"{q.scheme.describe()} does not fit into {wanted}")
    if bits == q.scheme.bits:
        if symmetric or q.zeros is not None:
            return q.codes, q.zeros
        return q.codes, np.full(q.scales.shape, q.zero_code, np.uint8)
    zero = 1 << (bits - 1)
    # uint8 wraps around, and the sums fit again: -15..15 plus 128, or -1..1 plus 8.
    own = q.zero_code if q.zeros is None else np.repeat(q.zeros, q.group_width, axis=1)
    codes = q.codes - np.asarray(own, np.uint8) + np.uint8(zero)
    return codes, None if symmetric else np.full(q.scales.shape, zero, np.uint8)
