"""The tile configurations of the Triton kernels that are shipped."""

from __future__ import annotations

from cpm_edge.plugins.kernel_config import KernelConfig, Parameter, Quotient
from cpm_edge.plugins.matmul_nbits.spans import GROUPS, span_of
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

MODULE = "cpm_edge.plugins.matmul_nbits.triton"

# Bytes of a row that one tile of the one-row kernel reads, by bits: the number of columns is about the same.
TILE_BYTES = {4: 256, 2: 128}
GEMV_ROWS = 16
# Rows of x that a tile covers: few for the rest of a chunk, many for a whole one.
GEMM_TILES = ((16, 64), (64, 64))


def parameters(symmetric: bool) -> tuple[Parameter, ...]:
    """x (m, k), the weights of ``spans.py``, y (m, n); k is a multiple of a group and so of 16."""
    pointers = [("x", "*fp16"), ("codes", "*u8"), ("scales", "*fp16"), ("zeros", "*u8"), ("y", "*fp16")]
    found = [Parameter(name, kind, True) for name, kind in pointers if name != "zeros" or not symmetric]
    return (
        *found,
        Parameter("m", "i32"),
        Parameter("n", "i32"),
        Parameter("k", "i32", True),
        Parameter("row_bytes", "i32", True),
    )


def _constants(bits: int, group: int, symmetric: bool) -> dict[str, int | None]:
    zero = NBitsShape(1, group, bits, group).zero
    found: dict[str, int | None] = {"BITS": bits, "GROUP": group, "SPAN": span_of(bits, group), "ZERO": zero}
    return found | ({"zeros": None} if symmetric else {})


def gemv(bits: int, group: int, symmetric: bool = True) -> KernelConfig:
    """One row of x a program."""
    part = span_of(bits, group) * bits // 8
    return KernelConfig(
        f"nbits_gemv_{_format(bits, group, symmetric)}",
        MODULE,
        "nbits_gemv",
        parameters(symmetric),
        _constants(bits, group, symmetric) | {"BLOCK_N": GEMV_ROWS, "SPANS": TILE_BYTES[bits] // part},
        ((Quotient("n", GEMV_ROWS),), (Quotient("m"),), ()),
    )


def gemm(
    bits: int, group: int, symmetric: bool = True, tile: tuple[int, int] = GEMM_TILES[0]
) -> KernelConfig:
    """Tiles of rows of x and rows of the weight."""
    rows, columns = tile
    return KernelConfig(
        f"nbits_gemm_{_format(bits, group, symmetric)}_{rows}x{columns}",
        MODULE,
        "nbits_gemm",
        parameters(symmetric),
        _constants(bits, group, symmetric) | {"BLOCK_M": rows, "BLOCK_N": columns},
        ((Quotient("n", columns),), (Quotient("m", rows),), ()),
    )


def configurations() -> list[KernelConfig]:
    """Every shipped configuration: int4 symmetric and asymmetric, and ternary, in all groups."""
    formats = [(bits, group, True) for bits in (4, 2) for group in GROUPS]
    formats += [(4, group, False) for group in GROUPS]
    products = [gemm(*each, tile=tile) for each in formats for tile in GEMM_TILES]
    return [gemv(*each) for each in formats] + products


def _format(bits: int, group: int, symmetric: bool) -> str:
    return f"{'int4' if bits == 4 else 'ternary'}_g{group}{'' if symmetric else '_asym'}"
