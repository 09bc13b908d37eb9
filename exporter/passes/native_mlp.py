"""The MLPs of which native kernels read a part, as the traced graph has them.

RMSNormalization, router, MixtureOfExperts, [scale], residual              cpm.NormExperts
RMSNormalization, gate above a threshold, up, down, [scale], residual      cpm.NormSparseMlp
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.experts import Experts
from cpm_edge.exporter.passes.native_match import (
    Branch,
    branch_of,
    norm_of,
    only_user,
    only_user_of_type,
    producer,
    scalar,
    weight_of,
)


@dataclass(frozen=True)
class ExpertsNodes:
    """A mixture of experts with what surrounds it.

    Attributes:
        norm: of the rows that the router and all experts read.
        router: its weight (experts, H).
        branch: how the result joins the residual, which is the norm's input.
    """

    norm: ir.Node
    router: ir.Value | None
    branch: Branch


def find_experts_nodes(experts: Experts) -> ExpertsNodes:
    """The surroundings of a cpm.MixtureOfExperts node.

    Raises:
        ExportError: the graph around it is another.
    """
    product = producer(experts.node.inputs[1], "MatMul")
    norm, _ = norm_of(product)
    branch = branch_of(experts.node.outputs[0])
    if branch.residual is not norm.inputs[0]:
        raise ExportError(f"internal: expected {experts.prefix} to be added to what is normalized for it")
    return ExpertsNodes(norm, producer(product.inputs[1], "Transpose").inputs[0], branch)


@dataclass(frozen=True)
class SparseMlpNodes:
    """A gated MLP with a threshold on the gate; gate, up and down are tensor names."""

    norm: ir.Node
    gate: str
    up: str
    down: str
    threshold: float
    branch: Branch


def find_sparse_mlps(graph: ir.Graph) -> list[SparseMlpNodes]:
    """Every MLP whose gate is 0 up to a threshold, in graph order.

    Raises:
        ExportError: the columns of a down projection are in another order (desc_act), or the graph around a
            gate is another.
    """
    return [_around(node) for node in graph if node.op_type == "LessOrEqual"]


def _around(comparison: ir.Node) -> SparseMlpNodes:
    threshold = scalar(comparison)
    if threshold is None:
        raise ExportError(f"internal: expected a constant threshold in {comparison.name}")
    gate = producer(comparison.inputs[0], "MatMul")
    gated = only_user_of_type(comparison.outputs[0], "Where").outputs[0]
    product = only_user_of_type(gated, "Mul")
    up = producer(product.inputs[0] if product.inputs[1] is gated else product.inputs[1], "MatMul")
    down = only_user(product.outputs[0])
    if down.op_type == "Gather":
        raise ExportError(
            f"tensor {weight_of(only_user(down.outputs[0]))}: the native flavour reads single neurons of "
            "this MLP, and its columns are in act order (desc_act)",
            hint="--flavour stock",
        )
    norm, _ = norm_of(gate)
    return SparseMlpNodes(
        norm, weight_of(gate), weight_of(up), weight_of(down), threshold, branch_of(down.outputs[0])
    )
