"""The step of a recurrent layer that the native graph runs as one node, through the native library.

q, k = rotate(rms_norm(q) * query_norm), rotate(rms_norm(k) * key_norm)      each head by itself
o    = linear_attention(q, k, v)
y    = rms_norm(o) * output_norm * sigmoid(gate)                             all heads together
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, best_isa, check, library, pointer

Floats = npt.NDArray[np.float32]


class CRecurrentRows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "size")),
        *((name, ctypes.c_void_p) for name in ("mixed", "query_norm", "key_norm", "output_norm")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "decay")),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("output", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class RecurrentNorms:
    """Weights of the three normalizations: (D,), (D,) and (H * D,)."""

    query: Floats
    key: Floats
    output: Floats
    epsilon: float


def recurrent_attention(
    pool: ThreadPool,
    spec: LinearAttentionSpec,
    norms: RecurrentNorms,
    mixed: Floats,
    rotation: tuple[Floats, Floats],
    state: Floats,
    *,
    isa: Isa | None = None,
    out: Floats | None = None,
) -> Floats:
    """The output (T, H * D); ``state`` (H, D, D) becomes the state after the last row.

    Args:
        mixed: (T, 4 * H * D) float32: queries, keys, values and gates of each row.
        rotation: cosines and sines (T, D / 2).

    Raises:
        NativeError: shapes that do not fit together, an odd D, or other types.
    """
    heads, size, _ = state.shape
    rows, width = len(mixed), heads * size
    output = np.empty((rows, width), np.float32) if out is None else out
    arrays = {
        "mixed": (mixed, (rows, 4 * width)),
        "query norm": (norms.query, (size,)),
        "key norm": (norms.key, (size,)),
        "output norm": (norms.output, (width,)),
        "cosines": (rotation[0], (rows, size // 2)),
        "sines": (rotation[1], (rows, size // 2)),
        "state": (state, (spec.num_heads, size, size)),
        "out": (output, (rows, width)),
    }
    for name, (array, shape) in arrays.items():
        if array.shape != shape:
            raise NativeError(f"{name}: expected {shape}, got {array.shape}")
    decay = np.asarray(spec.decay, np.float32)
    call = CRecurrentRows(
        rows=rows,
        heads=heads,
        size=size,
        mixed=pointer(mixed, np.float32),
        query_norm=pointer(norms.query, np.float32),
        key_norm=pointer(norms.key, np.float32),
        output_norm=pointer(norms.output, np.float32),
        cosine=pointer(rotation[0], np.float32),
        sine=pointer(rotation[1], np.float32),
        decay=pointer(decay, np.float32),
        scale=spec.scale,
        epsilon=norms.epsilon,
        output=pointer(output, np.float32),
    )
    status = library().cpm_recurrent_attention(
        pool.handle,
        ctypes.c_int32(best_isa() if isa is None else isa),
        ctypes.byref(call),
        pointer(state, np.float32),
    )
    check(status, "cpm_recurrent_attention")
    return output


def gate_output(pool: ThreadPool, gate: Floats, values: Floats, *, isa: Isa | None = None) -> None:
    """``values`` (T, n) times sigmoid(``gate``), in place; ``gate`` may be columns of a wider matrix.

    Raises:
        NativeError: shapes that do not fit together, or other types.
    """
    if gate.shape != values.shape or gate.dtype != np.float32 or gate.strides[1] != 4:
        raise NativeError(f"gate: expected float32 rows {values.shape}, got {gate.dtype} {gate.shape}")
    rows, width = values.shape
    stride = gate.strides[0] // 4 if rows > 1 else width
    status = library().cpm_output_gate(
        pool.handle,
        ctypes.c_int32(best_isa() if isa is None else isa),
        ctypes.c_void_p(gate.ctypes.data),
        ctypes.c_int64(stride),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        pointer(values, np.float32),
    )
    check(status, "cpm_output_gate")
