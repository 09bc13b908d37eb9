"""Which Triton kernels ``cpm.MatMulNBits`` launches, and the configurations that are shipped.

Inputs in order: x (..., k) float16, then codes, scales and, of asymmetric weights, zeros of ``spans.py``.
"""

from __future__ import annotations

from cpm_edge.plugins.kernel_config import Axis, KernelConfig, Parameter, Quotient
from cpm_edge.plugins.launch_plan import ROWS, Argument, Launch, LaunchPlan, Variant, inputs, outputs
from cpm_edge.plugins.matmul_nbits.spans import GROUPS, check_shape, span_of
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

MODULE = "cpm_edge.plugins.matmul_nbits.triton"

# Bytes of a row that one tile of the one-row kernel reads, by bits: 512 columns, of bytes 256.
TILE_BYTES = {8: 256, 4: 256, 2: 128}
GEMV_ROWS = 16
# Rows of x up to which each reads its weights alone: a tensor core's tile of 16 costs about as much as 4.
GEMV_UP_TO = 4
# Rows of x that a tile covers: few for the rest of a chunk, many for a whole one.
GEMM_TILES = ((16, 64), (64, 64))
INT8_DEPTH = 64  # columns a step


def gemv(bits: int, group: int, symmetric: bool = True) -> KernelConfig:
    """One row of x a program; group 0 is the row."""
    tile = TILE_BYTES[bits]
    constants = {"BLOCK_K": tile} if bits == 8 else {"SPANS": tile // (span_of(bits, group) * bits // 8)}
    grid = ((Quotient("m"),), (Quotient("n", GEMV_ROWS),), ())
    return _config("gemv", "", bits, group, symmetric, {"BLOCK_N": GEMV_ROWS, **constants}, grid)


def gemm(
    bits: int, group: int, symmetric: bool = True, tile: tuple[int, int] = GEMM_TILES[0]
) -> KernelConfig:
    """Tiles of rows of x and rows of the weight."""
    rows, columns = tile
    constants = {"BLOCK_M": rows, "BLOCK_N": columns} | ({"BLOCK_K": INT8_DEPTH} if bits == 8 else {})
    grid = ((Quotient("m", rows), Quotient("n", columns)), (), ())
    return _config("gemm", f"_{rows}x{columns}", bits, group, symmetric, constants, grid)


def matmul_plan(shape: NBitsShape) -> LaunchPlan:
    """A row of x a program up to ``GEMV_UP_TO`` rows, then tiles.

    Raises:
        ValueError: a format that the kernels do not take.
    """
    check_shape(shape)
    form = (shape.bits, shape.group, shape.symmetric)
    small, large = (gemm(*form, tile=tile) for tile in GEMM_TILES)
    arguments: dict[str, Argument] = {
        **inputs("x", "codes", "scales", "" if shape.symmetric else "zeros"),
        **outputs("y"),
        **{"m": ROWS, "n": shape.rows, "k": shape.cols},
    }
    if shape.bits != 8:
        span = span_of(shape.bits, shape.group)
        arguments["row_bytes"] = -(-shape.cols // span) * span * shape.bits // 8

    def variant(limit: int | None, kernel: KernelConfig) -> Variant:
        return Variant(limit, (Launch(kernel, arguments),))

    # Above two small tiles a large one takes less: it is the first whose weights serve three of them.
    return LaunchPlan(
        (variant(GEMV_UP_TO, gemv(*form)), variant(2 * GEMM_TILES[0][0], small), variant(None, large))
    )


def configurations() -> list[KernelConfig]:
    """Every shipped configuration: int8, int4 symmetric and asymmetric, and ternary, in all groups."""
    formats = [(8, 0, True), *((bits, group, True) for bits in (4, 2) for group in GROUPS)]
    formats += [(4, group, False) for group in GROUPS]
    products = [gemm(*each, tile=tile) for each in formats for tile in GEMM_TILES]
    return [gemv(*each) for each in formats] + products


def _parameters(bits: int, symmetric: bool) -> tuple[Parameter, ...]:
    """x (m, k), the weights of ``spans.py``, y (m, n); k is a multiple of 16."""
    pointers = [("x", "*fp16"), ("codes", "*u8"), ("scales", "*fp16"), ("zeros", "*u8"), ("y", "*fp16")]
    found = [Parameter(name, kind, True) for name, kind in pointers if name != "zeros" or not symmetric]
    sizes = [Parameter("m", "i32"), Parameter("n", "i32"), Parameter("k", "i32", True)]
    return (*found, *sizes, *([] if bits == 8 else [Parameter("row_bytes", "i32", True)]))


def _config(
    kind: str,
    tile: str,
    bits: int,
    group: int,
    symmetric: bool,
    constants: dict[str, int],
    grid: tuple[Axis, Axis, Axis],
) -> KernelConfig:
    family = "int8" if bits == 8 else "nbits"
    found: dict[str, int | None] = {"ZERO": NBitsShape(1, group or 32, bits, group).zero}
    if bits != 8:
        found |= {"BITS": bits, "GROUP": group, "SPAN": span_of(bits, group)}
        found |= {"zeros": None} if symmetric else {}
    return KernelConfig(
        f"nbits_{kind}_{_format(bits, group, symmetric)}{tile}",
        MODULE,
        f"{family}_{kind}",
        _parameters(bits, symmetric),
        found | constants,
        grid,
    )


def _format(bits: int, group: int, symmetric: bool) -> str:
    if bits == 8:
        return "int8"
    return f"{'int4' if bits == 4 else 'ternary'}_g{group}{'' if symmetric else '_asym'}"
