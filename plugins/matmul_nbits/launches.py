"""Which Triton kernels ``cpm.MatMulNBits`` launches, and the configurations that are shipped.

Inputs in order: x (..., k) float16, then codes, scales and, of asymmetric weights, zeros of ``spans.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_edge.plugins.kernel_config import KernelConfig, Parameter, Quotient
from cpm_edge.plugins.launch_plan import ROWS, Argument, Launch, LaunchPlan, Variant, inputs, outputs
from cpm_edge.plugins.matmul_nbits.spans import GROUPS, check_shape, span_of
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

MODULE = "cpm_edge.plugins.matmul_nbits.triton"

STEP = 128  # columns of a step of the loop, at least: the loop itself then costs little


@dataclass(frozen=True)
class Tile:
    """Rows of x and rows of the weight that a program multiplies.

    Attributes:
        rows_up_to: of x, for which it is chosen.
    """

    rows: int
    columns: int
    rows_up_to: int | None
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


# One warp a program has the most programs: a decode step has no other parallelism than rows of the weight.
DECODE = Tile(8, 16, 8, warps=1, stages=4)
# Above two small tiles a large one takes less: it is the first whose weights serve three of them.
SMALL = Tile(16, 64, 32, warps=4, stages=3)
LARGE = Tile(64, 64, None, warps=4, stages=3)
TILES = (DECODE, SMALL, LARGE)


def product(bits: int, group: int, symmetric: bool = True, tile: Tile = DECODE) -> KernelConfig:
    """The kernel of a format in one tile; group 0 is the row."""
    constants: dict[str, int | None] = {"ZERO": NBitsShape(1, group or 32, bits, group).zero}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns}
    if bits == 8:
        constants["BLOCK_K"] = STEP
    else:
        span = span_of(bits, group)
        constants |= {"BITS": bits, "GROUP": group, "SPAN": span, "UNROLL": max(1, STEP // span)}
        constants |= {"zeros": None} if symmetric else {}
    return KernelConfig(
        f"nbits_{_format(bits, group, symmetric)}_{tile}",
        MODULE,
        "int8_product" if bits == 8 else "nbits_product",
        _parameters(bits, symmetric),
        constants,
        ((Quotient("m", tile.rows), Quotient("n", tile.columns)), (), ()),
        tile.warps,
        tile.stages,
    )


def matmul_plan(shape: NBitsShape) -> LaunchPlan:
    """A tile by the number of rows.

    Raises:
        ValueError: a format that the kernels do not take.
    """
    check_shape(shape)
    arguments: dict[str, Argument] = {
        **inputs("x", "codes", "scales", "" if shape.symmetric else "zeros"),
        **outputs("y"),
        **{"m": ROWS, "n": shape.rows, "k": shape.cols},
    }
    if shape.bits != 8:
        span = span_of(shape.bits, shape.group)
        arguments["row_bytes"] = -(-shape.cols // span) * span * shape.bits // 8
    kernels = [product(shape.bits, shape.group, shape.symmetric, tile) for tile in TILES]
    return LaunchPlan(
        tuple(
            Variant(tile.rows_up_to, (Launch(kernel, arguments),))
            for tile, kernel in zip(TILES, kernels, strict=True)
        )
    )


def configurations() -> list[KernelConfig]:
    """Every shipped configuration: int8, int4 symmetric and asymmetric, and ternary, in all groups."""
    formats = [(8, 0, True), *((bits, group, True) for bits in (4, 2) for group in GROUPS)]
    formats += [(4, group, False) for group in GROUPS]
    return [product(*each, tile=tile) for each in formats for tile in TILES]


def _parameters(bits: int, symmetric: bool) -> tuple[Parameter, ...]:
    """x (m, k), the weights of ``spans.py``, y (m, n); k is a multiple of 16."""
    pointers = [("x", "*fp16"), ("codes", "*u8"), ("scales", "*fp16"), ("zeros", "*u8"), ("y", "*fp16")]
    found = [Parameter(name, kind, True) for name, kind in pointers if name != "zeros" or not symmetric]
    sizes = [Parameter("m", "i32"), Parameter("n", "i32"), Parameter("k", "i32", True)]
    return (*found, *sizes, *([] if bits == 8 else [Parameter("row_bytes", "i32", True)]))


def _format(bits: int, group: int, symmetric: bool) -> str:
    if bits == 8:
        return "int8"
    return f"{'int4' if bits == 4 else 'ternary'}_g{group}{'' if symmetric else '_asym'}"
