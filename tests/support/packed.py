"""Checkpoints of packed int4 as GPTQ, AWQ and Marlin tools write them, from the statement of their layouts.

Nothing here uses the readers: every packer puts one integer after the other where its format wants it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Weight = npt.NDArray[np.float32]
Raw = dict[str, npt.NDArray[Any]]

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packing:
    """How a checkpoint is quantized.

    Attributes:
        format: gptq, gptq_v2, awq, marlin (tensors B and s) or awq_marlin (qweight and scales).
        group: columns; -1 is the row.
        symmetric: zero point 8.
        act_order: the columns of a group are spread over the row.
        scale_type: of the stored scales.
        floats: modules (last part of the name) that stay floats.
    """

    format: str
    group: int = 128
    symmetric: bool = True
    act_order: bool = False
    scale_type: Any = np.float16
    floats: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """quantization_config as the tools write it."""
        if self.format.startswith("awq"):
            version = "marlin" if self.format == "awq_marlin" else "gemm"
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group,
                "version": version,
                "zero_point": not self.symmetric,
                "modules_to_not_convert": list(self.floats) or None,
            }
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": self.format,
            "damp_percent": 0.01,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": False,
            "meta": {"quantizer": ["gptqmodel:1.0"]},
        }


@dataclass(frozen=True)
class Int4:
    """Codes (rows, cols), zeros and scales (rows, groups), and the group of each column (cols,)."""

    codes: Bytes
    zeros: Bytes
    scales: Weight
    g_idx: npt.NDArray[np.int32]

    def weight(self) -> Weight:
        signed = self.codes.astype(np.float32) - self.zeros[:, self.g_idx]
        return np.asarray(signed * self.scales[:, self.g_idx])

    def sorted(self) -> Int4:
        """The same with its columns sorted by group."""
        order = np.argsort(self.g_idx, kind="stable")
        return replace(self, codes=self.codes[:, order], g_idx=self.g_idx[order])


def quantized(weight: Weight, packing: Packing, seed: int) -> Int4:
    """A matrix rounded to int4; the column order depends on ``seed`` and the columns alone."""
    cols = weight.shape[1]
    count = 1 if packing.group == -1 else cols // packing.group
    g_idx = np.arange(cols, dtype=np.int32) // (cols // count)
    if packing.act_order:
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    members = np.argsort(g_idx, kind="stable").reshape(count, -1)
    groups = weight[:, members]
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    span = 2 * np.maximum(-low, high) if packing.symmetric else high - low
    scales = (span / 15).astype(packing.scale_type).astype(np.float32)
    zeros = np.full(scales.shape, 8.0) if packing.symmetric else np.clip(np.rint(-low / scales), 1, 15)
    codes = np.clip(np.rint(weight / scales[:, g_idx]) + zeros[:, g_idx], 0, 15)
    return Int4(codes.astype(np.uint8), zeros.astype(np.uint8), scales, g_idx)


def pack(module: str, matrix: Int4, packing: Packing) -> Raw:
    """The stored tensors of one matrix."""
    scales = np.ascontiguousarray(matrix.scales.T).astype(packing.scale_type)
    if packing.format in ("marlin", "awq_marlin"):
        codes, kept = ("B", "s") if packing.format == "marlin" else ("qweight", "scales")
        raw = {codes: pack_marlin(matrix.codes), kept: permute_marlin_scales(scales)}
    elif packing.format == "awq":
        raw = {"qweight": pack_awq(matrix.codes), "qzeros": pack_awq(matrix.zeros), "scales": scales}
    else:
        less = 1 if packing.format == "gptq" else 0
        raw = {
            "qweight": pack_gptq(matrix.codes),
            "qzeros": words(matrix.zeros - np.uint8(less)),
            "scales": scales,
            "g_idx": matrix.g_idx,
        }
    return {f"{module}.{part}": tensor for part, tensor in raw.items()}


def words(codes: Bytes) -> npt.NDArray[np.int32]:
    """Eight codes of a column after the other to a word, the first in the lowest bits: (8 n, m) to (m, n)."""
    packed = np.zeros((codes.shape[1], len(codes) // 8), np.uint32)
    for place in range(8):
        packed |= codes[place::8].T.astype(np.uint32) << np.uint32(4 * place)
    return packed.view(np.int32)


def pack_gptq(codes: Bytes) -> npt.NDArray[np.int32]:
    """qweight (cols / 8, rows) of codes (rows, cols)."""
    return np.ascontiguousarray(words(np.ascontiguousarray(codes.T)).T)


def pack_awq(codes: Bytes) -> npt.NDArray[np.int32]:
    """qweight (cols, rows / 8) of codes (rows, cols)."""
    order = [8 * eight + row for eight in range(len(codes) // 8) for row in AWQ_ROWS]
    return words(codes[order])


def pack_marlin(codes: Bytes) -> npt.NDArray[np.int32]:
    """B (cols / 16, 2 rows) of codes (rows, cols): 32 lanes of 4 words for each 16 columns and 64 rows."""
    rows, cols = codes.shape
    packed = np.zeros((cols // 16, 2 * rows), np.uint32)
    for band in range(rows // 64):
        for lane in range(32):
            for sixteen in range(4):
                # Eight codes: two rows 8 apart, four columns of each; even ones go first into a word.
                corner = 64 * band + 16 * sixteen + lane // 4
                column = [2 * (lane % 4) + step for step in (0, 1, 8, 9)]
                eight = [(corner + 8 * half, column[c]) for half in range(2) for c in range(4)]
                word = 128 * band + 4 * lane + sixteen
                for place, index in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    row, first = eight[index]
                    packed[:, word] |= codes[row, first::16].astype(np.uint32) << np.uint32(4 * place)
    return packed.view(np.int32)


def permute_marlin_scales(scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scales (groups, rows) in the order in which Marlin's lanes read them."""
    if len(scales) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return np.ascontiguousarray(scales.reshape(-1, len(order))[:, order].reshape(scales.shape))


WIDE = "gptq-wide"  # its scales are exact in float32 alone

# By the name of the variant in tests.support.checkpoints.
PACKINGS: dict[str, Packing] = {
    "gptq": Packing("gptq"),
    "gptq-asym": Packing("gptq", 32, symmetric=False),
    "gptq-v2": Packing("gptq_v2", 64, symmetric=False),
    "gptq-row": Packing("gptq", -1),
    "gptq-act-order": Packing("gptq", 128, act_order=True),
    "gptq-act-order-asym": Packing("gptq_v2", 32, symmetric=False, act_order=True),
    "gptq-bf16-scales": Packing("gptq", 128, scale_type=ml_dtypes.bfloat16),
    WIDE: Packing("gptq", 128, scale_type=np.float32),
    "gptq-floats": Packing("gptq", 128, symmetric=False, floats=("v_proj", "up_proj")),
    "awq": Packing("awq", 128, symmetric=False),
    "awq-32": Packing("awq", 32, symmetric=False),
    "awq-sym": Packing("awq", 64),
    "marlin": Packing("marlin"),
    "marlin-row": Packing("marlin", -1),
    "awq-marlin": Packing("awq_marlin", 64),
}
# Of MiniCPM3; the first is how its GPTQ release is quantized, in smaller groups.
LATENT_PACKINGS: dict[str, Packing] = {
    "minicpm3-gptq": Packing("gptq", 32, act_order=True),
    "minicpm3-awq": Packing("awq", 32, symmetric=False),
}
