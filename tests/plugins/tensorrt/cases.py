"""Nodes as an export makes them, small: their plans, fields and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cpm_edge.plugins.kernel_config import KernelConfig
from cpm_edge.plugins.launch_plan import LaunchPlan, distinct
from cpm_edge.plugins.linear_attention.launches import linear_attention_plan
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.matmul_nbits.launches import matmul_plan
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.sparse_attention.launches import plan as attention_plan
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

# Numbers of nvinfer1::DataType.
FLOAT, HALF, INT8, INT32 = 0, 1, 2, 3

Tensor = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        attributes: integers.
        tensors: of the inputs, for a number of rows.
        shapes: of each output, a size being INPUT.DIMENSION.
        types: of the outputs.
        aliases: the input that each output lies on, or -1.
    """

    name: str
    op: str
    attributes: Mapping[str, int]
    plan: LaunchPlan
    tensors: Callable[[int], list[Tensor]]
    shapes: tuple[str, ...]
    types: tuple[int, ...]
    aliases: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def limits(self) -> list[int]:
        """The smallest and the largest number of rows of every variant, but of the last one no largest."""
        largest = [each.rows_up_to for each in self.plan.variants if each.rows_up_to]
        return sorted({1, *largest, *(each + 1 for each in largest)})


def matmul(name: str, shape: NBitsShape) -> Case:
    width = shape.cols * shape.bits // 8
    groups = shape.cols // (shape.group or shape.cols)

    def tensors(rows: int) -> list[Tensor]:
        found: list[Tensor] = [(HALF, (1, rows, shape.cols)), (INT8, (shape.rows, width))]
        found.append((HALF, (groups, shape.rows)))
        return found if shape.symmetric else [*found, (INT8, (groups, shape.rows))]

    attributes = {"bits": shape.bits, "group": shape.group, "n": shape.rows, "k": shape.cols}
    return Case(
        name,
        "CpmMatMulNBits",
        attributes,
        matmul_plan(shape),
        tensors,
        ("0.0x0.1x1.0",),
        (HALF,),
        (-1,),
    )


def attention(name: str, spec: SparseAttentionSpec, size: int, capacity: int) -> Case:
    heads = spec.kv_num_heads

    def tensors(rows: int) -> list[Tensor]:
        cache: Tensor = (HALF, (1, heads, capacity, size))
        new: Tensor = (HALF, (1, rows, heads * size))
        found: list[Tensor] = [
            (HALF, (1, rows, spec.num_heads * size)),
            new,
            new,
            cache,
            cache,
            (INT32, (1,)),
        ]
        pooled: Tensor = (HALF, (1, heads, capacity // spec.kernel_stride, size))
        return found if spec.is_dense else [*found, pooled]

    in_place = (3, 4) if spec.is_dense else (3, 4, 6)
    return Case(
        name,
        "CpmSparseAttention",
        {"topk": spec.topk},
        attention_plan(spec, size, capacity),
        tensors,
        ("0.0x0.1x0.2", *(f"{i}.0x{i}.1x{i}.2x{i}.3" for i in in_place)),
        (HALF,) * (1 + len(in_place)),
        (-1, *in_place),
    )


def linear(name: str, heads: int, size: int, value_size: int) -> Case:
    spec = LinearAttentionSpec((-0.5,) * heads, size**-0.5)

    def tensors(rows: int) -> list[Tensor]:
        wide: Tensor = (HALF, (1, rows, heads * size))
        value: Tensor = (HALF, (1, rows, heads * value_size))
        return [wide, wide, value, (FLOAT, (1, heads, size, value_size)), (FLOAT, (heads,))]

    return Case(
        name,
        "CpmLinearAttention",
        {},
        linear_attention_plan(spec, size, value_size),
        tensors,
        ("2.0x2.1x2.2", "3.0x3.1x3.2x3.3"),
        (FLOAT, FLOAT),
        (-1, 3),
    )


CASES = [
    matmul("int4", NBitsShape(72, 192, 4, 64, symmetric=False)),
    matmul("int8", NBitsShape(40, 96, 8, 0)),
    attention("dense", SparseAttentionSpec.dense(4, 2, 0.25), 16, 256),
    attention(
        "sparse", SparseAttentionSpec(8, 2, 0.25, 8, 4, 16, 1, 32, 3, dense_len=64, coarse_lse=1), 16, 256
    ),
    linear("linear", 3, 32, 16),
]
KERNELS: list[KernelConfig] = distinct([case.plan for case in CASES])
