"""``cpm.MixtureOfExperts`` through the native library."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.native import CShape, c_shape
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec
from cpm_edge.plugins.native import Isa, ThreadPool, best_isa, check, library, pointer

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class CExperts(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("inner", CShape),
        ("outer", CShape),
        ("w1", ctypes.c_void_p),
        ("w3", ctypes.c_void_p),
        ("w2", ctypes.c_void_p),
        ("router", ctypes.c_void_p),
    )


def mixture_of_experts(
    pool: ThreadPool,
    spec: MixtureOfExpertsSpec,
    shapes: tuple[NBitsShape, NBitsShape],
    panels: tuple[Bytes, Bytes, Bytes],
    router: Floats,
    x: Floats,
    *,
    residual: Floats,
    scale: float = 1.0,
    isa: Isa | None = None,
    out: Floats | None = None,
) -> Floats:
    """residual + scale * experts(x): float32 (m, H).

    Args:
        shapes: of one expert's w1 and w3, (F, H), and of its w2, (H, F).
        panels: of w1, w3 and w2, those of all experts one behind the other.
        router: (experts, H).
        x, residual: (m, H).
        out: written and returned instead of a new array.

    Raises:
        NativeError: shapes that do not fit each other, or no such instruction set here.
    """
    output = np.empty_like(x) if out is None else out
    experts = CExperts(
        spec.num_experts,
        spec.top_k,
        *(c_shape(shape) for shape in shapes),
        *(pointer(part, np.uint8) for part in panels),
        pointer(router, np.float32),
    )
    status = library().cpm_mixture_of_experts(
        pool.handle,
        ctypes.c_int32(best_isa() if isa is None else isa),
        ctypes.byref(experts),
        pointer(x, np.float32),
        ctypes.c_int64(len(x)),
        pointer(residual, np.float32),
        ctypes.c_float(scale),
        pointer(output, np.float32),
    )
    check(status, "cpm_mixture_of_experts")
    return output
