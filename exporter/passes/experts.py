"""Finding the experts of a traced graph, and writing them out in standard operators."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from cpm_edge.exporter.errors import ExportWarning
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.mixture_of_experts.body import functions
from cpm_edge.plugins.mixture_of_experts.spec import OP, MixtureOfExpertsSpec


@dataclass(frozen=True)
class Experts:
    """One cpm.MixtureOfExperts node; w1 (gate), w3 (up) and w2 (down) are tensor names by expert."""

    node: ir.Node
    spec: MixtureOfExpertsSpec
    w1: list[str]
    w3: list[str]
    w2: list[str]

    @property
    def tensors(self) -> list[str]:
        return [*self.w1, *self.w3, *self.w2]

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with: ``model.layers.N.mlp.experts``."""
        return self.w1[0].removesuffix(".0.w1.weight")


def find_experts(graph: ir.Graph) -> list[Experts]:
    """Every cpm.MixtureOfExperts node, in graph order."""
    return [_described(node) for node in graph if (node.domain, node.op_type) == (DOMAIN, OP)]


def _described(node: ir.Node) -> Experts:
    spec = MixtureOfExpertsSpec(node.attributes.get_int("num_experts"), node.attributes.get_int("top_k"))
    names = [value.name or "" for value in node.inputs[2:] if value is not None]
    parts = [names[i : i + spec.num_experts] for i in range(0, len(names), spec.num_experts)]
    return Experts(node, spec, *parts)


def inline_uneven_experts(model: ir.Model, weights: ModelWeights) -> int:
    """Inline all experts if those of one layer differ in format or have their columns in another order.

    The targets keep the experts of one layer in one tensor, whose products read the same activations.

    Returns:
        How many nodes were replaced.
    """
    experts = find_experts(model.graph)
    if all(_is_even(each, weights) for each in experts):
        return 0
    return inline_experts(model)


def _is_even(experts: Experts, weights: ModelWeights) -> bool:
    schemes = {(s.format, s.symmetric) for s in map(weights.scheme, experts.tensors)}
    return len(schemes) == 1 and all(weights.column_order(name) is None for name in experts.tensors)


def inline_experts(model: ir.Model, *, whole: bool = False) -> int:
    """Replace all nodes by the op's body: every product with an expert becomes a linear layer of its own.

    Args:
        whole: run every expert on every token; else on those that chose it.

    Returns:
        How many nodes were replaced.
    """
    experts = find_experts(model.graph)
    if not experts:
        return 0
    opset = model.graph.opset_imports[""]
    for function in functions(experts[0].spec, opset=opset, whole=whole):
        model.functions[function.identifier()] = function
    InlinePass()(model)
    model.functions.clear()
    return len(experts)


def inline_whole_experts(model: ir.Model) -> int:
    """Run every expert on every token: no shape of an engine may depend on what a router chose.

    Returns:
        How many nodes were replaced.
    """
    spec = next((each.spec for each in find_experts(model.graph)), None)
    if spec is not None:
        warnings.warn(
            f"TensorRT reads all {spec.num_experts} experts of a layer for every token, where {spec.top_k} "
            "are chosen: --target aipc reads the chosen ones only",
            ExportWarning,
            stacklevel=2,
        )
    return inline_experts(model, whole=True)
