"""The sparse MLP through the native library."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.native import CShape, c_shape
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import Isa, ThreadPool, best_isa, check, library, pointer

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Sparsity(ctypes.Structure):
    """Sums over single rows: neurons, those whose gate passed; bytes of W_up and W_down, and those read."""

    _fields_ = (
        ("neurons", ctypes.c_int64),
        ("active", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("read", ctypes.c_int64),
    )


class CSparseMlpWeights(ctypes.Structure):
    _fields_ = (
        ("gate", CShape),
        ("up", CShape),
        ("down", CShape),
        ("gate_panels", ctypes.c_void_p),
        ("up_strips", ctypes.c_void_p),
        ("down_slices", ctypes.c_void_p),
        ("threshold", ctypes.c_float),
    )


@dataclass(frozen=True)
class SparseMlp:
    """The weights: ``gate`` in panels (see matmul_nbits), ``up`` in strips, ``down`` in slices."""

    gate_shape: NBitsShape
    up_shape: NBitsShape
    down_shape: NBitsShape
    gate: Bytes
    up: Bytes
    down: Bytes
    threshold: float


def sparse_mlp(
    pool: ThreadPool,
    mlp: SparseMlp,
    x: Floats,
    *,
    residual: Floats,
    scale: float = 1.0,
    isa: Isa | None = None,
    out: Floats | None = None,
    count: Sparsity | None = None,
) -> Floats:
    """residual + scale * MLP(x): float32 (m, H) from x and residual (m, H). A single row is counted.

    ``out`` is written and returned instead of a new array.

    Raises:
        NativeError: shapes that do not fit each other, or no such instruction set here.
    """
    output = np.empty_like(x) if out is None else out
    weights = CSparseMlpWeights(
        *(c_shape(shape) for shape in (mlp.gate_shape, mlp.up_shape, mlp.down_shape)),
        *(pointer(part, np.uint8) for part in (mlp.gate, mlp.up, mlp.down)),
        mlp.threshold,
    )
    status = library().cpm_sparse_mlp(
        pool.handle,
        ctypes.c_int32(best_isa() if isa is None else isa),
        ctypes.byref(weights),
        pointer(x, np.float32),
        ctypes.c_int64(len(x)),
        pointer(residual, np.float32),
        ctypes.c_float(scale),
        pointer(output, np.float32),
        ctypes.byref(Sparsity() if count is None else count),
    )
    check(status, "cpm_sparse_mlp")
    return output
