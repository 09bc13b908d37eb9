"""``cpm.LinearAttention`` through the native library."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, best_isa, check, library, pointer

Floats = npt.NDArray[np.float32]


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "batch",
            "rows",
            "heads",
            "size",
            "value_size",
            "query_stride",
            "key_stride",
            "value_stride",
        )
    )


def linear_attention(
    pool: ThreadPool,
    spec: LinearAttentionSpec,
    query: Floats,
    key: Floats,
    value: Floats,
    state: Floats,
    *,
    isa: Isa | None = None,
    out: Floats | None = None,
) -> Floats:
    """The output (B, T, H * Dv); ``state`` (B, H, D, Dv) becomes the state after the last row.

    Args:
        query, key, value: (B, T, H * D or Dv), float32. Columns of one wider matrix are read in place.

    Raises:
        NativeError: shapes that do not fit together, other types, or gaps that are not between rows.
    """
    batch, rows, _ = query.shape
    heads = spec.num_heads
    size, value_size = state.shape[2:]
    expected = {
        "query": (query, (batch, rows, heads * size)),
        "key": (key, (batch, rows, heads * size)),
        "value": (value, (batch, rows, heads * value_size)),
        "state": (state, (batch, heads, size, value_size)),
    }
    output = np.empty((batch, rows, heads * value_size), np.float32) if out is None else out
    expected["out"] = (output, (batch, rows, heads * value_size))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise NativeError(f"{name}: expected {shape}, got {array.shape}")
    decay = np.asarray(spec.decay, np.float32)
    strides = [_row_stride(name, array) for name, array in (("query", query), ("key", key), ("value", value))]
    status = library().cpm_linear_attention(
        pool.handle,
        ctypes.c_int32(best_isa() if isa is None else isa),
        ctypes.byref(_Shape(batch, rows, heads, size, value_size, *strides)),
        ctypes.c_void_p(query.ctypes.data),
        ctypes.c_void_p(key.ctypes.data),
        ctypes.c_void_p(value.ctypes.data),
        pointer(decay, np.float32),
        ctypes.c_float(spec.scale),
        pointer(state, np.float32),
        pointer(output, np.float32),
    )
    check(status, "cpm_linear_attention")
    return output


def _row_stride(name: str, array: Floats) -> int:
    """Floats from one row (B, T) to the next."""
    batch, rows, width = array.shape
    stride = array.strides[1] // 4 if rows > 1 else array.strides[0] // 4 if batch > 1 else width
    regular = (
        stride >= width and array.strides[2] == 4 and (batch == 1 or array.strides[0] == 4 * rows * stride)
    )
    if array.dtype != np.float32 or (array.size and not regular):
        raise NativeError(f"{name}: expected float32 rows at one distance, got {array.dtype} {array.strides}")
    return stride
