"""A layer of latent attention for the native kernels: three products and one op around the session's cache.

RMSNormalization, q_a product                       cpm.NormLinear
RMSNormalization, q_b product                       cpm.NormLinear
RMSNormalization, kv_a product                      cpm.NormLinear
norm, rotary embedding, absorbed products, SparseAttention    cpm.LatentAttention

Where kv_b_proj's columns are stored in another order (desc_act), latents are cached in that order: the
normalization treats all columns alike, and nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.native_match import only_user, producer, weight_of
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins.sparse_attention.native_latent import UpProjection
from cpm_edge.quant import Quantized

UP = ".up"
_Latents = tuple[ir.Value, ir.Value | None, list[ir.Node]]


@dataclass(frozen=True)
class LatentNodes:
    """What one latent attention is made of in the traced graph.

    Attributes:
        query_down, query_up, latent: the products q_a, q_b and kv_a.
        rotation: of the key; its tables are those of the queries too.
        norm: of the latents.
        up: name of kv_b_proj's weight.
        output: the heads' values, before o_proj.
    """

    query_down: ir.Node
    query_up: ir.Node
    latent: ir.Node
    rotation: ir.Node
    norm: ir.Node
    up: str
    output: ir.Value


def find_latent(node: ir.Node) -> LatentNodes:
    """The surroundings of a SparseAttention node of the latent form.

    Raises:
        ExportError: the graph around it is another.
    """
    query, key = node.inputs[0], node.inputs[1]
    rows = _before(key, "Concat")
    norm, rotation = _before(rows.inputs[0], "RMSNormalization"), _before(rows.inputs[1], "RotaryEmbedding")
    latent = _before(_before(norm.inputs[0], "Slice").inputs[0], "MatMul")
    absorbed = _before(_before(_before(query, "Reshape").inputs[0], "Concat").inputs[0], "Transpose")
    product = _before(absorbed.inputs[0], "MatMul")
    plain = _before(_before(product.inputs[0], "Transpose").inputs[0], "Slice")
    query_up = _before(_before(plain.inputs[0], "Reshape").inputs[0], "MatMul")
    down_norm = _before(query_up.inputs[0], "RMSNormalization")
    up = _before(_before(product.inputs[1], "Slice").inputs[0], "Reshape").inputs[0]
    if up is not None and up.producer() is not None:
        up = _before(up, "Gather").inputs[0]  # which puts the columns into their places
    query_down = _before(down_norm.inputs[0], "MatMul")
    return LatentNodes(query_down, query_up, latent, rotation, norm, _name(up), _values(node))


def sort_latents(graph: ir.Graph, found: LatentNodes, latent: ir.Value, weights: ModelWeights) -> _Latents:
    """The new rows and the weight of their norm, in the order in which kv_b_proj's columns are stored.

    Args:
        latent: what kv_a's fused product makes of the rows, (B, T, rank + rope).

    Returns:
        Rows, weight, and the nodes that sort them: none where the columns are in their places.
    """
    order, norm = weights.column_order(found.up), found.norm.inputs[1]
    if order is None:
        return latent, norm, []
    builder, name = Builder(graph), found.up.removesuffix(".weight")
    columns = np.concatenate([order, np.arange(len(order), _rows_of(found.latent, weights))])
    rows_order = builder.constant(f"{name}.row_order", columns, np.int32)
    norm_order = builder.constant(f"{name}.norm_order", order, np.int32)
    rows = builder.op("Gather", [latent, rows_order], {"axis": -1}, name=f"{name}.sorted_rows")
    weight = builder.op("Gather", [norm, norm_order], {"axis": -1}, name=f"{name}.sorted_norm")
    return rows, weight, builder.nodes


def up_projection(blocks: Iterator[Quantized]) -> UpProjection:
    """A matrix in int8 rows or int4 groups as the kernel reads it."""
    codes, scales = [], []
    for block in blocks:
        zeros = np.repeat(block.zero_points(), block.group_width, axis=1)
        codes.append((block.codes.astype(np.int16) - zeros).astype(np.int8))
        scales.append(block.scales)
    return UpProjection(np.concatenate(codes), np.concatenate(scales))


def up_bytes(weights: ModelWeights, name: str) -> int:
    """Bytes of the packed up-projection.

    Raises:
        ExportError: it is stored in floats.
    """
    scheme, (rows, cols) = weights.scheme(name), weights.shapes[name]
    if scheme.format.is_float:
        raise ExportError(
            f"tensor {name}: the native flavour takes int4 and int8, got {scheme.format.value}",
            hint="--weight-format int4 or int8, or --flavour stock",
        )
    return rows * (4 * scheme.groups(cols) + cols)


def latent_attributes(node: ir.Node, found: LatentNodes, weights: ModelWeights) -> dict[str, int | float]:
    """Attributes of LatentAttention, but for its layer.

    Raises:
        ExportError: sizes that the kernel does not take.
    """
    heads, rank = node.attributes.get_int("num_heads"), node.attributes.get_int("v_head_size")
    rope = _rows_of(found.latent, weights) - rank
    nope = _rows_of(found.query_up, weights) // heads - rope
    value = weights.shapes[found.up][0] // heads - nope
    groups = weights.scheme(found.up).groups(rank)
    for key, size, multiple in (
        ("kv_lora_rank a scale", rank / groups, 8),
        ("qk_rope_head_dim", rope, 8),
        ("v_head_dim", value, 16),
    ):
        if size % multiple:
            raise ExportError(
                f"the native flavour wants {key} to be a multiple of {multiple}, got {size:g}",
                hint="--flavour stock",
            )
    return {
        "num_heads": heads,
        "rank": rank,
        "nope_size": nope,
        "rope_size": rope,
        "value_size": value,
        "groups": groups,
        "scale": node.attributes.get_float("scale"),
        "epsilon": found.norm.attributes.get_float("epsilon", 1e-5),
    }


def _rows_of(product: ir.Node, weights: ModelWeights) -> int:
    """Rows of a linear layer's weight."""
    return weights.shapes[weight_of(product)][0]


def _name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def _values(node: ir.Node) -> ir.Value:
    """What the second half of kv_b_proj makes of the attention's output, as o_proj reads it."""
    value = node.outputs[0]
    products = 0
    while True:
        user = only_user(value)
        if user.op_type in ("MatMul", "Gather"):
            products += 1
            if products == 2:
                return value
        elif user.op_type not in ("Reshape", "Transpose", "Identity"):
            raise ExportError(f"internal: expected o_proj after {node.name}, got {user.op_type}")
        value = user.outputs[0]


def _before(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node of this type that made a value, looking through Identity."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Identity":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return producer(value, op_type)
