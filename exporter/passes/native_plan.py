"""The packed weights of the native graph, and the ops that read them.

Weights are uint8 inputs named after the fused tensors with an ending that tells their layout; NativePlan
keeps which tensors they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.sparse_mlp.spec import slice_bytes, slice_count, strip_bytes

# Endings of weights' names, by layout: see plugins/matmul_nbits and plugins/sparse_mlp.
PANELS, STRIPS, SLICES = ".panels", ".strips", ".slices"


@dataclass
class NativePlan:
    """What the fused graph reads.

    Attributes:
        panels: for each input of packed weights, the tensors it concatenates along the rows.
        ups: for each input that is an up-projection of latent attention, its tensor.
        shapes: the kernels' view of each of the tensors in panels.
    """

    panels: dict[str, list[str]] = field(default_factory=dict)
    ups: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, NBitsShape] = field(default_factory=dict)


class PackedOps:
    """Makes the nodes that read packed weights.

    Args:
        graph: gets an input for every packed weight.
        weights: their schemes decide the attributes of the nodes.
        session: the graph's input with the address of the session.

    Attributes:
        plan: what the nodes read.
    """

    def __init__(self, graph: ir.Graph, weights: ModelWeights, session: ir.Value) -> None:
        self.plan = NativePlan()
        self._graph = graph
        self._weights = weights
        self._session = session

    def joined(self, tensors: list[str]) -> dict[str, list[str]]:
        """Panels that are those of several tensors side by side: one product gives all results in turn."""
        if len(tensors) > 1 and any(self._weights.shapes[tensor][0] % 8 for tensor in tensors):
            raise ExportError(f"the native kernels want a multiple of 8 rows in each of {', '.join(tensors)}")
        return {"+".join(tensors) + PANELS: tensors}

    def op(
        self,
        op_type: str,
        name: str,
        inputs: list[ir.Value | None],
        packed: Mapping[str, list[str]],
        attributes: dict[str, int | float],
    ) -> ir.Node:
        """A node that reads packed weights of one format, by input name the tensors they are made of.

        Its attribute ``rows`` is the number of rows of the first of them unless ``attributes`` has another.
        """
        tensors = [tensor for parts in packed.values() for tensor in parts]
        shapes = nbits_shapes(self._weights, tensors)
        self.plan.shapes.update(zip(tensors, shapes, strict=True))
        shape, first = shapes[0], next(iter(packed.values()))
        attributes = {
            "rows": sum(self._weights.shapes[tensor][0] for tensor in first),
            **attributes,
            "bits": shape.bits,
            "group": shape.group,
            "symmetric": int(shape.symmetric),
        }
        weights = [self._packed(*item) for item in packed.items()]
        converted = ir.convenience.convert_attributes(attributes)
        return ir.Node(
            DOMAIN, op_type, [*inputs, *weights, self._session], converted, num_outputs=1, name=name
        )

    def _packed(self, name: str, tensors: list[str]) -> ir.Value:
        if name not in self.plan.panels:
            self.plan.panels[name] = tensors
            size = sum(packed_bytes(name, self.plan.shapes[tensor]) for tensor in tensors)
            value = ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.UINT8))
            self._graph.inputs.append(value)
        return next(value for value in self._graph.inputs if value.name == name)


def nbits_shapes(weights: ModelWeights, names: Sequence[str]) -> list[NBitsShape]:
    """The kernels' view of tensors that one op reads, which have one format there.

    Tensors that bring their own integers may differ: the smallest group holds for all, with the scales of the
    others repeated, and the most bits, with zero points if one of int4 has them. No weight changes.

    Raises:
        ExportError: the kernels have no such format.
    """
    schemes = [weights.scheme(name) for name in names]
    for name, scheme in zip(names, schemes, strict=True):
        if scheme.format.is_float:
            raise ExportError(
                f"tensor {name}: the native flavour takes int4, int8 and ternary, got {scheme.format.value}",
                hint="--weight-format int4 or int8, or --flavour stock",
            )
        if scheme.wide_scales:
            raise ExportError(
                f"tensor {name}: the native flavour keeps float16 scales, and these are not exact in float16",
                hint="--flavour stock keeps float32 scales; --weight-format int4 rounds them",
            )
    groups = [scheme.group_size for scheme in schemes if scheme.group_size is not None]
    group, bits = min(groups, default=0), max(scheme.bits for scheme in schemes)
    symmetric = bits > 4 or all(scheme.symmetric for scheme in schemes)
    sizes = [weights.shapes[name] for name in names]
    return [NBitsShape(rows, cols, bits, group, symmetric) for rows, cols in sizes]


def packed_bytes(name: str, shape: NBitsShape) -> int:
    """Bytes of a matrix in the layout that the ending of ``name`` tells."""
    if name.endswith(STRIPS):
        return shape.rows * strip_bytes(shape)
    if name.endswith(SLICES):
        return slice_count(shape) * slice_bytes(shape)
    group = 16 + (0 if shape.symmetric else 8) + 8 * shape.group_cols * shape.bits // 8
    return shape.panels * shape.groups * group
