"""Which Triton kernels ``cpm.LinearAttention`` launches, and the configurations that are shipped.

Inputs in order: query, key, value, past_state and decay, the attribute as float32 (H,), which kernels read.
"""

from __future__ import annotations

from cpm_edge.plugins.kernel_config import KernelConfig, Parameter, Quotient
from cpm_edge.plugins.launch_plan import ROWS, Launch, LaunchPlan, Variant, inputs, outputs
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec

MODULE = "cpm_edge.plugins.linear_attention.triton"

SIZES = range(16, 129, 8)
# Columns of the state a program: as many as registers hold beside the products of a chunk.
BLOCK_V = 32
CHUNK = 32
# SALA's heads.
SHIPPED = ((128, 128),)

_POINTERS = (
    *(("query", "*fp16"), ("key", "*fp16"), ("value", "*fp16"), ("past_state", "*fp32")),
    *(("decay", "*fp32"), ("output", "*fp32"), ("present_state", "*fp32")),
)


def recurrent(size: int, value_size: int) -> KernelConfig:
    """One row."""
    return _config("recurrent", size, value_size, (), {}, stages=1)


def chunked(size: int, value_size: int) -> KernelConfig:
    """Any number of rows."""
    return _config("chunked", size, value_size, (Parameter("rows", "i32"),), {"CHUNK": CHUNK}, stages=2)


def linear_attention_plan(spec: LinearAttentionSpec, size: int, value_size: int) -> LaunchPlan:
    """One row by the recurrence, more in chunks; batch 1.

    Args:
        size, value_size: of a head's keys and values.

    Raises:
        ValueError: a size that the kernels do not take.
    """
    common = {
        **inputs("query", "key", "value", "past_state", "decay"),
        **outputs("output", "present_state"),
        "width": spec.num_heads * value_size,
        "scale": float(spec.scale),
    }
    one, many = recurrent(size, value_size), chunked(size, value_size)
    return LaunchPlan(
        (Variant(1, (Launch(one, common),)), Variant(None, (Launch(many, {**common, "rows": ROWS}),)))
    )


def configurations() -> list[KernelConfig]:
    """Every shipped configuration."""
    return [make(*sizes) for sizes in SHIPPED for make in (recurrent, chunked)]


def _config(
    kind: str, size: int, value_size: int, more: tuple[Parameter, ...], constants: dict[str, int], stages: int
) -> KernelConfig:
    for name, each in (("head size", size), ("value head size", value_size)):
        if each not in SIZES:
            raise ValueError(f"{name}: expected a multiple of 8 from 16 to 128, got {each}")
    # The largest power of two that divides the values of a head, up to the tile.
    block = min(BLOCK_V, value_size & -value_size)
    return KernelConfig(
        f"linear_{kind}_d{size}" + (f"_v{value_size}" if value_size != size else ""),
        MODULE,
        f"linear_{kind}",
        (
            *(Parameter(name, type, True) for name, type in _POINTERS),
            *more,
            *(Parameter("width", "i32"), Parameter("scale", "fp32")),
        ),
        {
            **{"SIZE": size, "VALUE_SIZE": value_size},
            **{"BLOCK_D": 1 << (size - 1).bit_length(), "BLOCK_V": block},
            **constants,
        },
        ((Quotient("width", block),), (), ()),
        stages=stages,
    )
