"""Specification of ``cpm.MatMulNBits``: the contract of com.microsoft MatMulNBits, and our packed panels.

    y[m, n] = sum over k of x[m, k] * (code[n, k] - zero[n, k / group]) * scale[n, k / group]

Bits 4 (zero 8, or one of 0..15 per group), bits 2 (ternary: codes 0, 1, 2 with zero 1) and bits 8 (zero 128).
The native kernels quantize x to int8 in blocks of 32 columns (scale = max |x| / 127; 128 beside bits 2
with groups of 128 or a multiple), sum integers exactly and scale in float32. Panels are described in
csrc/kernels/matmul_nbits.h.
"""

from __future__ import annotations

from dataclasses import dataclass

PANEL_ROWS = 8
BLOCK = 32
WIDE_BLOCK = 128
SMALLEST_PEAK = 2.0**-120  # blocks of activations below it count as zero


@dataclass(frozen=True)
class NBitsShape:
    """One weight matrix.

    Attributes:
        rows, cols: N and K.
        bits: 2, 4 or 8.
        group: columns that share a scale, a multiple of 32 that divides cols; 0 for one scale a row.
        symmetric: no stored zero points; asymmetric weights have 4 bits.
    """

    rows: int
    cols: int
    bits: int
    group: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits: expected 2, 4 or 8, got {self.bits}")
        if not self.symmetric and self.bits != 4:
            raise ValueError(f"zero points: expected 4 bits, got {self.bits}")
        if self.group and (self.group % BLOCK or self.cols % self.group):
            raise ValueError(
                f"group: expected a multiple of {BLOCK} that divides {self.cols}, got {self.group}"
            )

    @property
    def zero(self) -> int:
        """The fixed zero point of symmetric weights."""
        return {2: 1, 4: 8, 8: 128}[self.bits]

    @property
    def activation_block(self) -> int:
        """Columns of activations that share a scale."""
        return WIDE_BLOCK if self.bits == 2 and self.group_cols % WIDE_BLOCK == 0 else BLOCK

    @property
    def padded_cols(self) -> int:
        return -(-self.cols // BLOCK) * BLOCK

    @property
    def group_cols(self) -> int:
        return self.group or self.padded_cols

    @property
    def groups(self) -> int:
        return self.padded_cols // self.group_cols

    @property
    def panels(self) -> int:
        return -(-self.rows // PANEL_ROWS)
