"""From the traced graph to the few nodes a layer that the native kernels run.

    RMSNormalization, q/k/v products              cpm.NormLinear over the three weights as one
    [RotaryEmbedding,] SparseAttention, [gate]    cpm.CachedAttention: caches belong to the session
    norms, RotaryEmbedding, LinearAttention, gate cpm.RecurrentAttention: so do states
    product, [scale], residual                    cpm.LinearAdd
    RMSNormalization, gate, up, silu, product     cpm.NormGated
    RMSNormalization, [scale], head               cpm.NormLinear

Every op takes the session's address last (input ``session``: 8 bytes, since the CPU plugin narrows int64 to
int32). Weights are uint8 inputs named after the fused tensors with the ending ``.panels``; NativePlan keeps
which tensors they are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.sparse_attention.spec import OP

PANELS = ".panels"


@dataclass
class NativePlan:
    """What the fused graph reads.

    Attributes:
        panels: for each panel input, the tensors it concatenates along the rows.
        shapes: the kernels' view of each of these tensors.
    """

    panels: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, NBitsShape] = field(default_factory=dict)


@dataclass(frozen=True)
class _OutputGate:
    """product = output * sigmoid"""

    sigmoid: ir.Node
    product: ir.Node


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


class NativeFusion:
    """Rewrites one traced graph.

    Args:
        graph: changed in place.
        weights: their schemes decide the ops' attributes.
    """

    def __init__(self, graph: ir.Graph, weights: ModelWeights) -> None:
        self.graph = graph
        self.weights = weights
        self.plan = NativePlan()
        self.session = ir.Value(name="session", shape=ir.Shape([8]), type=ir.TensorType(ir.DataType.UINT8))

    def run(self) -> NativePlan:
        """Fuse everything.

        Raises:
            ExportError: a part of the graph is not what the kernels expect.
        """
        self.graph.inputs.append(self.session)
        for layer, node in enumerate(self._mixers()):
            if node.op_type == LINEAR:
                self._recurrent(node, layer)
            else:
                self._attention(node, layer)
        for node in [n for n in self.graph if n.op_type == "Sigmoid"]:
            self._gated(node)
        self._head()
        self._drop_cache_ports()
        left = [n.op_type for n in self.graph if n.op_type in ("RMSNormalization", "MatMul", OP, LINEAR)]
        if left:
            raise ExportError(f"internal: the native kernels do not cover {', '.join(sorted(set(left)))}")
        return self.plan

    def _attention(self, node: ir.Node, layer: int) -> None:
        query, key, value, _, _, past_length = node.inputs
        rotations = [node for node in map(_rotation, (query, key)) if node is not None]
        rotated = [rotation.inputs[0] for rotation in rotations] or [query, key]
        products = [_producer(rows, "MatMul") for rows in (*rotated, value)]
        tables = rotations[0].inputs[1:3] if rotations else ()
        output = node.outputs[0]
        gate = _output_gate(output)
        if gate is not None:
            products.append(_producer(gate.sigmoid.inputs[0], "MatMul"))
        qkv = self._norm_linear(products, f"layers.{layer}.qkv", node)
        attributes = dict(node.attributes)
        attributes["layer"] = ir.AttrInt64("layer", layer)
        attributes["gated"] = ir.AttrInt64("gated", int(gate is not None))
        fused = ir.Node(
            DOMAIN, "CachedAttention", [qkv, *tables, past_length, self.session],
            attributes.values(), num_outputs=1, name=f"layers.{layer}.attention",
        )  # fmt: skip
        self._replace_mixer(node, fused, output, gate)

    def _recurrent(self, node: ir.Node, layer: int) -> None:
        query, key, value, _ = node.inputs
        rotations = [_producer(rows, "RotaryEmbedding") for rows in (query, key)]
        norms = [_producer(_unshaped(rotation.inputs[0]), "RMSNormalization") for rotation in rotations]
        inputs = [_unshaped(norm.inputs[0]) for norm in norms]
        norms.append(_only_user_of_type(node.outputs[0], "RMSNormalization"))
        gate = _output_gate(norms[-1].outputs[0])
        if gate is None:
            raise ExportError(f"internal: expected an output gate after {norms[-1].name}")
        products = [_producer(rows, "MatMul") for rows in (*inputs, value, gate.sigmoid.inputs[0])]
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
        self._linear_add(_product_of(fused.outputs[0]))

    def _mixers(self) -> list[ir.Node]:
        """What mixes the tokens, one node a layer."""
        return [node for node in self.graph if node.domain == DOMAIN and node.op_type in (OP, LINEAR)]

    def _norm_linear(self, products: Sequence[ir.Node], name: str, before: ir.Node) -> ir.Value:
        norm, scale = _norm_of(products[0])
        tensors = [_weight_of(product) for product in products]
        fused = self._op(
            "NormLinear", name, [norm.inputs[0], norm.inputs[1]], [tensors],
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5), "scale": scale},
        )  # fmt: skip
        self.graph.insert_before(before, fused)
        return fused.outputs[0]

    def _linear_add(self, product: ir.Node) -> None:
        """product, [Mul by a constant], Add."""
        last, scale = product, 1.0
        user = _only_user(product.outputs[0])
        factor = _scalar(user) if user.op_type == "Mul" else None
        if factor is not None:
            last, scale = user, factor
        add = _only_user(last.outputs[0])
        if add.op_type != "Add":
            raise ExportError(
                f"internal: expected a residual addition after {product.name}, got {add.op_type}"
            )
        residual = add.inputs[0] if add.inputs[1] is last.outputs[0] else add.inputs[1]
        name = _weight_of(product).removesuffix(".weight")
        fused = self._op(
            "LinearAdd", name, [product.inputs[0], residual], [[_weight_of(product)]], {"scale": scale}
        )
        self.graph.insert_before(add, fused)
        ir.convenience.replace_all_uses_with(add.outputs[0], fused.outputs[0])

    def _gated(self, sigmoid: ir.Node) -> None:
        gate = _producer(sigmoid.inputs[0], "MatMul")
        silu = _only_user(sigmoid.outputs[0])
        product = _only_user(silu.outputs[0])
        other = product.inputs[0] if product.inputs[1] is silu.outputs[0] else product.inputs[1]
        up = _producer(other, "MatMul")
        norm, _ = _norm_of(gate)
        name = _weight_of(gate).removesuffix("gate_proj.weight") + "gated"
        fused = self._op(
            "NormGated", name, [norm.inputs[0], norm.inputs[1]], [[_weight_of(gate)], [_weight_of(up)]],
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        )  # fmt: skip
        self.graph.insert_before(product, fused)
        ir.convenience.replace_all_uses_with(product.outputs[0], fused.outputs[0])
        self._linear_add(_product_of(fused.outputs[0]))

    def _head(self) -> None:
        logits = next(value for value in self.graph.outputs if value.name == "logits")
        product = _producer(logits, "MatMul")
        fused = self._norm_linear([product], "head", product)
        position = self.graph.outputs.index(logits)
        logits.name = "unfused_logits"
        fused.name, fused.shape, fused.type = "logits", logits.shape, logits.type
        self.graph.outputs[position] = fused

    def _op(
        self,
        op_type: str,
        name: str,
        inputs: list[ir.Value | None],
        tensors: list[list[str]],
        attributes: dict[str, int | float],
    ) -> ir.Node:
        flat = [tensor for parts in tensors for tensor in parts]
        shapes = nbits_shapes(self.weights, flat)
        self.plan.shapes.update(zip(flat, shapes, strict=True))
        shape = shapes[0]
        rows = sum(self.weights.shapes[tensor][0] for tensor in tensors[0])
        if len(tensors[0]) > 1 and any(self.weights.shapes[tensor][0] % 8 for tensor in tensors[0]):
            raise ExportError(f"{name}: the native kernels want a multiple of 8 rows in each of {tensors[0]}")
        panels = [self._panels(parts) for parts in tensors]
        attributes = {
            **attributes,
            "rows": rows,
            "bits": shape.bits,
            "group": shape.group,
            "symmetric": int(shape.symmetric),
        }
        converted = ir.convenience.convert_attributes(attributes)
        return ir.Node(DOMAIN, op_type, [*inputs, *panels, self.session], converted, num_outputs=1, name=name)

    def _panels(self, tensors: list[str]) -> ir.Value:
        name = "+".join(tensors) + PANELS
        if name not in self.plan.panels:
            self.plan.panels[name] = tensors
            size = sum(panel_bytes(self.plan.shapes[tensor]) for tensor in tensors)
            value = ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.UINT8))
            self.graph.inputs.append(value)
        return next(value for value in self.graph.inputs if value.name == name)

    def _drop_cache_ports(self) -> None:
        """With the nodes that the fused ones replaced, which only their cache outputs keep alive."""
        for value in [v for v in self.graph.outputs if (v.name or "").startswith("present.")]:
            self.graph.outputs.remove(value)
        RemoveUnusedNodesPass()(ir.Model(self.graph, ir_version=10))
        for value in [v for v in self.graph.inputs if (v.name or "").startswith("past_key_values.")]:
            self.graph.inputs.remove(value)


def panel_bytes(shape: NBitsShape) -> int:
    """Bytes of a packed matrix."""
    group = 16 + (0 if shape.symmetric else 8) + 8 * shape.group_cols * shape.bits // 8
    return shape.panels * shape.groups * group


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        found = "an input" if node is None else node.op_type
        raise ExportError(f"internal: expected {op_type} before {value.name if value else '?'}, got {found}")
    return node


def _only_user(value: ir.Value) -> ir.Node:
    users = [node for node, _ in value.uses()]
    if len(users) != 1:
        raise ExportError(f"internal: expected one use of {value.name}, got {len(users)}")
    return users[0]


def _product_of(value: ir.Value) -> ir.Node:
    """The product that reads a value, maybe with its columns in another order."""
    user = _only_user(value)
    return _only_user(user.outputs[0]) if user.op_type == "Gather" else user


def _only_user_of_type(value: ir.Value, op_type: str) -> ir.Node:
    user = _only_user(value)
    if user.op_type != op_type:
        raise ExportError(f"internal: expected {op_type} after {value.name}, got {user.op_type}")
    return user


def _rotation(rows: ir.Value | None) -> ir.Node | None:
    """The rotary embedding that made the rows, None where there is none."""
    node = rows.producer() if rows is not None else None
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """The same numbers before a Reshape to heads, or from them."""
    return _producer(value, "Reshape").inputs[0]


def _output_gate(output: ir.Value) -> _OutputGate | None:
    """What multiplies an attention's output by a sigmoid, None where nothing does."""
    product = _only_user(output)
    if product.op_type != "Mul":
        return None
    other = product.inputs[0] if product.inputs[1] is output else product.inputs[1]
    return _OutputGate(_producer(other, "Sigmoid"), product)


def _weight_of(product: ir.Node) -> str:
    weight = _producer(product.inputs[1], "Transpose").inputs[0]
    assert weight is not None and weight.name is not None
    return weight.name


def _norm_of(product: ir.Node) -> tuple[ir.Node, float]:
    """The normalization before a product, and the constant factor between them."""
    value, scale = product.inputs[0], 1.0
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Div", "Mul"):
        factor = _scalar(node)
        assert factor is not None
        scale = 1.0 / factor if node.op_type == "Div" else factor
        value = node.inputs[0]
    return _producer(value, "RMSNormalization"), scale


def _scalar(node: ir.Node) -> float | None:
    """The constant second operand of a node, None when it is not one."""
    constant = node.inputs[1].const_value if node.inputs[1] is not None else None
    return float(constant.numpy()) if constant is not None and constant.size == 1 else None
