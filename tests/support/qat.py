"""Weights as quantization-aware training leaves them: int4 multiplied out and rounded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tests.support.packed import Int4

Weight = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Training:
    """How it quantized.

    Attributes:
        group: columns that share a scale.
        steps: scale = largest magnitude / steps.
        scale_type: in which training computed it.
        floats: modules (last part of the name) that it left alone.
    """

    group: int
    steps: int = 7
    scale_type: Any = ml_dtypes.bfloat16
    floats: tuple[str, ...] = ()


QAT_WIDE = "qat-wide"  # its scales are float32
QATS = {
    "qat": Training(128),
    "qat-32": Training(32, steps=8),
    "qat-floats": Training(64, floats=("o_proj", "up_proj")),
    QAT_WIDE: Training(64, scale_type=np.float32),
}


def trained(weight: Weight, training: Training) -> Int4:
    """Codes and scales of a matrix."""
    groups = weight.reshape(len(weight), -1, training.group)
    scales = (np.abs(groups).max(axis=2) / training.steps).astype(training.scale_type).astype(np.float32)
    codes = np.clip(np.rint(groups / scales[:, :, None]), -8, 7) + 8
    g_idx = np.arange(weight.shape[1], dtype=np.int32) // training.group
    return Int4(
        codes.astype(np.uint8).reshape(weight.shape), np.full(scales.shape, 8, np.uint8), scales, g_idx
    )


def in_bfloat16(matrix: Int4) -> npt.NDArray[Any]:
    """What the checkpoint holds of it."""
    return matrix.weight().astype(ml_dtypes.bfloat16)
