"""16-bit floats from float32, with numpy alone: numpy has no bfloat16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError

FP16_MAX = 65504.0


def to_bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even; same shape.

    NaN stays NaN with its sign and infinity stays infinity. A finite value above the largest bfloat16
    (3.39e38) by half a step or more becomes infinity, as IEEE 754 rounds.

    Raises:
        QuantError: the array is not float32.
    """
    if values.dtype != np.float32:
        raise QuantError(f"bfloat16 conversion: expected float32, got {values.dtype}")
    flat = np.ascontiguousarray(values).reshape(-1)
    bits = flat.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    # Rounding a NaN may carry it into infinity or past the sign: take it unrounded and made quiet.
    nan = np.isnan(flat)
    rounded[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)
    return rounded.astype(np.uint16).reshape(values.shape)


def from_bf16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits, exact; same shape."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def to_fp16(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """The nearest float16 of a (rows, cols) matrix, ties to even.

    Raises:
        QuantError: NaN or infinity, or a value beyond float16's range, with the row.
    """
    check_finite(weight)
    with np.errstate(over="ignore", under="ignore"):
        half = weight.astype(np.float16)
    lost = np.isinf(half)
    if lost.any():
        row = int(np.argmax(lost.any(axis=1)))
        worst = float(np.abs(weight[row]).max())
        raise QuantError(
            f"holds {worst:.6g}, beyond float16's largest value {FP16_MAX:.0f}",
            hint="store this tensor as bf16 or fp32",
            row=row,
        )
    return half


def check_finite(weight: npt.NDArray[np.float32]) -> None:
    """Refuse NaN and infinity in a (rows, cols) float32 matrix.

    Raises:
        QuantError: not float32 (rows, cols), or a value that is not finite, with its row.
    """
    if weight.dtype != np.float32 or weight.ndim != 2:
        raise QuantError(f"weight: expected float32 (rows, cols), got {weight.dtype} {weight.shape}")
    if weight.size == 0:
        return
    # The extremes of a row carry any NaN or infinity in it: no mask of the block's size is needed.
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(weight.min(axis=1)) & np.isfinite(weight.max(axis=1))
    refuse_non_finite(finite)


def refuse_non_finite(finite_rows: npt.NDArray[np.bool_]) -> None:
    """Raise for the first False in a (rows,) mask of finite rows.

    Raises:
        QuantError: with the row.
    """
    if not finite_rows.all():
        row = int(np.argmin(finite_rows))
        raise QuantError(
            "holds NaN or infinity, expected finite weights",
            hint="the checkpoint is damaged or was saved after training diverged; download it again",
            row=row,
        )
