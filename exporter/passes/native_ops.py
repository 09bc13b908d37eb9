"""From the traced graph to the few nodes a layer that the native kernels run.

    RMSNormalization, q/k/v products              cpm.NormLinear over the three weights as one
    [RotaryEmbedding,] SparseAttention, [gate]    cpm.CachedAttention: caches belong to the session
    norms, RotaryEmbedding, LinearAttention, gate cpm.RecurrentAttention: so do states
    latent attention                              see native_latent
    product, [scale], residual                    cpm.LinearAdd
    RMSNormalization, gate, up, silu, product     cpm.NormGated
    MLPs that need not be read as a whole         see native_mlp
    RMSNormalization, [scale], head               cpm.NormLinear

Every op takes the session's address last (input ``session``: 8 bytes, since the CPU plugin narrows int64 to
int32); its weights are packed (see native_plan).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.experts import Experts, find_experts
from cpm_edge.exporter.passes.native_latent import UP, find_latent, latent_attributes, sort_latents, up_bytes
from cpm_edge.exporter.passes.native_match import (
    branch_of,
    norm_of,
    only_user,
    only_user_of_type,
    producer,
    product_of,
    unshaped,
    weight_of,
)
from cpm_edge.exporter.passes.native_mlp import SparseMlpNodes, find_experts_nodes, find_sparse_mlps
from cpm_edge.exporter.passes.native_plan import PANELS, SLICES, STRIPS, NativePlan, PackedOps
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.mixture_of_experts.spec import OP as EXPERTS
from cpm_edge.plugins.sparse_attention.spec import OP

# What the kernels must have taken the place of.
_FUSED = ("RMSNormalization", "MatMul", OP, LINEAR, EXPERTS)


@dataclass(frozen=True)
class _OutputGate:
    """product = output * sigmoid"""

    sigmoid: ir.Node
    product: ir.Node


class NativeFusion:
    """Rewrites one traced graph.

    Args:
        graph: changed in place.
        weights: their schemes decide the ops' attributes.
    """

    def __init__(self, graph: ir.Graph, weights: ModelWeights) -> None:
        self.graph = graph
        self.weights = weights
        self.session = ir.Value(name="session", shape=ir.Shape([8]), type=ir.TensorType(ir.DataType.UINT8))
        self.packed = PackedOps(graph, weights, self.session)

    def run(self) -> NativePlan:
        """Fuse everything.

        Raises:
            ExportError: a part of the graph is not what the kernels expect.
        """
        self.graph.inputs.append(self.session)
        for layer, node in enumerate(self._mixers()):
            if node.op_type == LINEAR:
                self._recurrent(node, layer)
            elif node.attributes.get_int("v_head_size", 0):
                self._latent(node, layer)
            else:
                self._attention(node, layer)
        for node in [n for n in self.graph if n.op_type == "Sigmoid"]:
            self._gated(node)
        for mlp in find_sparse_mlps(self.graph):
            self._sparse_mlp(mlp)
        for experts in find_experts(self.graph):
            self._experts(experts)
        self._head()
        self._drop_cache_ports()
        left = [n.op_type for n in self.graph if n.op_type in _FUSED]
        if left:
            raise ExportError(f"internal: the native kernels do not cover {', '.join(sorted(set(left)))}")
        return self.packed.plan

    def _attention(self, node: ir.Node, layer: int) -> None:
        query, key, value, _, _, past_length = node.inputs
        rotations = [node for node in map(_rotation, (query, key)) if node is not None]
        rotated = [rotation.inputs[0] for rotation in rotations] or [query, key]
        products = [producer(rows, "MatMul") for rows in (*rotated, value)]
        tables = rotations[0].inputs[1:3] if rotations else ()
        output = node.outputs[0]
        gate = _output_gate(output)
        if gate is not None:
            products.append(producer(gate.sigmoid.inputs[0], "MatMul"))
        qkv = self._norm_linear(products, f"layers.{layer}.qkv", node)
        attributes = dict(node.attributes)
        attributes["layer"] = ir.AttrInt64("layer", layer)
        attributes["gated"] = ir.AttrInt64("gated", int(gate is not None))
        fused = ir.Node(
            DOMAIN, "CachedAttention", [qkv, *tables, past_length, self.session],
            attributes.values(), num_outputs=1, name=f"layers.{layer}.attention",
        )  # fmt: skip
        self._replace_mixer(node, fused, output, gate)

    def _latent(self, node: ir.Node, layer: int) -> None:
        found = find_latent(node)
        down = self._norm_linear([found.query_down], f"layers.{layer}.q_a", node)
        ir.convenience.replace_all_uses_with(found.query_down.outputs[0], down)
        query = self._norm_linear([found.query_up], f"layers.{layer}.q_b", node)
        latent = self._norm_linear([found.latent], f"layers.{layer}.kv_a", node)
        up = ir.Value(
            name=found.up + UP,
            shape=ir.Shape([up_bytes(self.weights, found.up)]),
            type=ir.TensorType(ir.DataType.UINT8),
        )
        self.graph.inputs.append(up)
        self.packed.plan.ups[found.up + UP] = found.up
        tables, past_length = found.rotation.inputs[1:3], node.inputs[5]
        latent, norm, sorting = sort_latents(self.graph, found, latent, self.weights)
        self.graph.insert_before(node, sorting)
        attributes = {"layer": layer, **latent_attributes(node, found, self.weights)}
        fused = ir.Node(
            DOMAIN, "LatentAttention",
            [query, latent, norm, *tables, up, past_length, self.session],
            ir.convenience.convert_attributes(attributes), num_outputs=1, name=f"layers.{layer}.attention",
        )  # fmt: skip
        self._replace_mixer(node, fused, found.output, None)

    def _recurrent(self, node: ir.Node, layer: int) -> None:
        query, key, value, _ = node.inputs
        rotations = [producer(rows, "RotaryEmbedding") for rows in (query, key)]
        norms = [producer(unshaped(rotation.inputs[0]), "RMSNormalization") for rotation in rotations]
        inputs = [unshaped(norm.inputs[0]) for norm in norms]
        norms.append(only_user_of_type(node.outputs[0], "RMSNormalization"))
        gate = _output_gate(norms[-1].outputs[0])
        if gate is None:
            raise ExportError(f"internal: expected an output gate after {norms[-1].name}")
        products = [producer(rows, "MatMul") for rows in (*inputs, value, gate.sigmoid.inputs[0])]
        mixed = self._norm_linear(products, f"layers.{layer}.qkvz", node)
        scales = [norm.inputs[1] for norm in norms]
        epsilons = {norm.attributes.get_float("epsilon", 1e-5) for norm in norms}
        if len(epsilons) > 1:
            raise ExportError(f"internal: expected one epsilon around {node.name}, got {sorted(epsilons)}")
        decay = Builder(self.graph).constant(
            f"layers.{layer}.decay", node.attributes.get_floats("decay"), np.float32
        )
        attributes = {
            "layer": layer, "scale": node.attributes.get_float("scale"), "epsilon": epsilons.pop()
        }  # fmt: skip
        fused = ir.Node(
            DOMAIN, "RecurrentAttention", [mixed, *scales, *rotations[0].inputs[1:3], decay, self.session],
            ir.convenience.convert_attributes(attributes), num_outputs=1, name=f"layers.{layer}.attention",
        )  # fmt: skip
        self._replace_mixer(node, fused, norms[-1].outputs[0], gate)

    def _replace_mixer(
        self, node: ir.Node, fused: ir.Node, output: ir.Value, gate: _OutputGate | None
    ) -> None:
        self.graph.insert_before(node, fused)
        if gate is not None:
            ir.convenience.replace_all_uses_with(gate.product.outputs[0], fused.outputs[0])
            self.graph.remove([gate.product, gate.sigmoid], safe=True)
        else:
            ir.convenience.replace_all_uses_with(output, fused.outputs[0])
        self._linear_add(product_of(fused.outputs[0]))

    def _mixers(self) -> list[ir.Node]:
        """What mixes the tokens, one node a layer."""
        return [node for node in self.graph if node.domain == DOMAIN and node.op_type in (OP, LINEAR)]

    def _norm_linear(self, products: Sequence[ir.Node], name: str, before: ir.Node) -> ir.Value:
        norm, scale = norm_of(products[0])
        tensors = [weight_of(product) for product in products]
        fused = self.packed.op(
            "NormLinear", name, [norm.inputs[0], norm.inputs[1]], self.packed.joined(tensors),
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5), "scale": scale},
        )  # fmt: skip
        self.graph.insert_before(before, fused)
        return fused.outputs[0]

    def _linear_add(self, product: ir.Node) -> None:
        branch, tensor = branch_of(product.outputs[0]), weight_of(product)
        fused = self.packed.op(
            "LinearAdd", tensor.removesuffix(".weight"), [product.inputs[0], branch.residual],
            self.packed.joined([tensor]), {"scale": branch.scale},
        )  # fmt: skip
        self.graph.insert_before(branch.add, fused)
        ir.convenience.replace_all_uses_with(branch.add.outputs[0], fused.outputs[0])

    def _gated(self, sigmoid: ir.Node) -> None:
        gate = producer(sigmoid.inputs[0], "MatMul")
        silu = only_user(sigmoid.outputs[0])
        product = only_user(silu.outputs[0])
        other = product.inputs[0] if product.inputs[1] is silu.outputs[0] else product.inputs[1]
        up = producer(other, "MatMul")
        norm, _ = norm_of(gate)
        name = weight_of(gate).removesuffix("gate_proj.weight") + "gated"
        fused = self.packed.op(
            "NormGated", name, [norm.inputs[0], norm.inputs[1]],
            self.packed.joined([weight_of(gate)]) | self.packed.joined([weight_of(up)]),
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        )  # fmt: skip
        self.graph.insert_before(product, fused)
        ir.convenience.replace_all_uses_with(product.outputs[0], fused.outputs[0])
        self._linear_add(product_of(fused.outputs[0]))

    def _sparse_mlp(self, mlp: SparseMlpNodes) -> None:
        norm, add = mlp.norm, mlp.branch.add
        fused = self.packed.op(
            "NormSparseMlp", mlp.gate.removesuffix(".gate_proj.weight"),
            [norm.inputs[0], norm.inputs[1], mlp.branch.residual],
            {mlp.gate + PANELS: [mlp.gate], mlp.up + STRIPS: [mlp.up], mlp.down + SLICES: [mlp.down]},
            {
                "epsilon": norm.attributes.get_float("epsilon", 1e-5), "scale": mlp.branch.scale,
                "threshold": mlp.threshold,
            },
        )  # fmt: skip
        self.graph.insert_before(add, fused)
        ir.convenience.replace_all_uses_with(add.outputs[0], fused.outputs[0])

    def _experts(self, experts: Experts) -> None:
        found = find_experts_nodes(experts)
        norm, add = found.norm, found.branch.add
        by_part = (("w1", experts.w1), ("w3", experts.w3), ("w2", experts.w2))
        fused = self.packed.op(
            "NormExperts", experts.prefix, [norm.inputs[0], norm.inputs[1], found.router],
            {f"{experts.prefix}.{part}{PANELS}": tensors for part, tensors in by_part},
            {
                "epsilon": norm.attributes.get_float("epsilon", 1e-5), "scale": found.branch.scale,
                "top_k": experts.spec.top_k, "rows": self.weights.shapes[experts.w1[0]][0],
            },
        )  # fmt: skip
        self.graph.insert_before(add, fused)
        ir.convenience.replace_all_uses_with(add.outputs[0], fused.outputs[0])

    def _head(self) -> None:
        logits = next(value for value in self.graph.outputs if value.name == "logits")
        product = producer(logits, "MatMul")
        fused = self._norm_linear([product], "head", product)
        position = self.graph.outputs.index(logits)
        logits.name = "unfused_logits"
        fused.name, fused.shape, fused.type = "logits", logits.shape, logits.type
        self.graph.outputs[position] = fused

    def _drop_cache_ports(self) -> None:
        """With the nodes that the fused ones replaced, which only their cache outputs keep alive."""
        for value in [v for v in self.graph.outputs if (v.name or "").startswith("present.")]:
            self.graph.outputs.remove(value)
        RemoveUnusedNodesPass()(ir.Model(self.graph, ir_version=10))
        for value in [v for v in self.graph.inputs if (v.name or "").startswith("past_key_values.")]:
            self.graph.inputs.remove(value)


def _rotation(rows: ir.Value | None) -> ir.Node | None:
    """The rotary embedding that made the rows, None where there is none."""
    node = rows.producer() if rows is not None else None
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _output_gate(output: ir.Value) -> _OutputGate | None:
    """What multiplies an attention's output by a sigmoid, None where nothing does."""
    product = only_user(output)
    if product.op_type != "Mul":
        return None
    other = product.inputs[0] if product.inputs[1] is output else product.inputs[1]
    return _OutputGate(producer(other, "Sigmoid"), product)
