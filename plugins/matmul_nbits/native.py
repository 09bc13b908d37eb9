"""``cpm.MatMulNBits`` through the native library."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, best_isa, check, library, pointer

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class CShape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
    )


def c_shape(shape: NBitsShape) -> CShape:
    return CShape(shape.rows, shape.cols, shape.bits, shape.group, int(shape.symmetric))


def panel_bytes(shape: NBitsShape) -> int:
    """Bytes of the packed panels.

    Raises:
        NativeError: the kernels do not take such a matrix.
    """
    function = library().cpm_nbits_bytes
    function.restype = ctypes.c_int64
    size = int(function(ctypes.byref(c_shape(shape))))
    if size < 0:
        raise NativeError(f"the kernels do not take {shape}")
    return size


def pack(
    shape: NBitsShape, codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes | None, flip: int = 0
) -> Bytes:
    """Panels from the storage layout.

    Args:
        codes: bits 8: (rows, cols); bits 4 and 2: packed along the columns, lowest bits first.
        scales: (rows, groups).
        zeros: (rows, groups), None when symmetric.
        flip: xor-ed onto every code, to take two's complement (8 for int4, 128 for int8).
    """
    panels = np.empty(panel_bytes(shape), np.uint8)
    status = library().cpm_nbits_pack(
        ctypes.byref(c_shape(shape)),
        pointer(codes, np.uint8),
        pointer(scales.view(np.uint16), np.uint16),
        pointer(zeros, np.uint8),
        ctypes.c_int32(flip),
        pointer(panels, np.uint8),
    )
    check(status, "cpm_nbits_pack")
    return panels


class MatmulCall:
    """``matmul`` with everything checked and converted: calling it costs what the kernel costs.

    May be called again. Keeps its arrays alive. Arguments and errors as for ``matmul``.

    Attributes:
        output: (m, rows), written by each call.
    """

    def __init__(
        self,
        pool: ThreadPool,
        shape: NBitsShape,
        panels: Bytes,
        x: Floats,
        *,
        residual: Floats | None = None,
        scale: float = 1.0,
        isa: Isa | None = None,
        out: Floats | None = None,
    ) -> None:
        self.output = np.empty((len(x), shape.rows), np.float32) if out is None else out
        self._kept = (panels, x, residual)
        self._pool = pool
        self._arguments = (
            ctypes.c_int32(best_isa() if isa is None else isa),
            ctypes.byref(c_shape(shape)),
            pointer(panels, np.uint8),
            pointer(x, np.float32),
            ctypes.c_int64(len(x)),
            pointer(self.output, np.float32),
            pointer(residual, np.float32),
            ctypes.c_float(scale),
        )

    def __call__(self) -> None:
        """Compute the product."""
        check(library().cpm_nbits_matmul(self._pool.handle, *self._arguments), "cpm_nbits_matmul")


def matmul(
    pool: ThreadPool,
    shape: NBitsShape,
    panels: Bytes,
    x: Floats,
    *,
    residual: Floats | None = None,
    scale: float = 1.0,
    isa: Isa | None = None,
    out: Floats | None = None,
) -> Floats:
    """x . w^T, or residual + scale * (x . w^T): float32 (m, rows) from x (m, cols)."""
    call = MatmulCall(pool, shape, panels, x, residual=residual, scale=scale, isa=isa, out=out)
    call()
    return call.output


def gated(
    pool: ThreadPool,
    shape: NBitsShape,
    gate: Bytes,
    up: Bytes,
    x: Floats,
    *,
    isa: Isa | None = None,
    out: Floats | None = None,
) -> Floats:
    """silu(x . gate^T) * (x . up^T) for two matrices of one shape: float32 (m, rows)."""
    y = np.empty((len(x), shape.rows), np.float32) if out is None else out
    status = library().cpm_nbits_gated(
        pool.handle,
        ctypes.c_int32(best_isa() if isa is None else isa),
        ctypes.byref(c_shape(shape)),
        pointer(gate, np.uint8),
        pointer(up, np.uint8),
        pointer(x, np.float32),
        ctypes.c_int64(len(x)),
        pointer(y, np.float32),
    )
    check(status, "cpm_nbits_gated")
    return y
