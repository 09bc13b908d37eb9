"""From the traced graph to the few nodes a layer that the native kernels run.

    RMSNormalization, q/k/v products              cpm.NormLinear over the three weights as one
    RotaryEmbedding, SparseAttention              cpm.CachedAttention: caches belong to the session
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

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins import DOMAIN
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
        layers = [node for node in self.graph if (node.domain, node.op_type) == (DOMAIN, OP)]
        for layer, attention in enumerate(layers):
            self._attention(attention, layer)
        for node in [n for n in self.graph if n.op_type == "Sigmoid"]:
            self._gated(node)
        self._head()
        self._drop_cache_ports()
        RemoveUnusedNodesPass()(ir.Model(self.graph, ir_version=10))
        left = [n.op_type for n in self.graph if n.op_type in ("RMSNormalization", "MatMul", OP)]
        if left:
            raise ExportError(f"internal: the native kernels do not cover {', '.join(sorted(set(left)))}")
        return self.plan

    def _attention(self, node: ir.Node, layer: int) -> None:
        query, key, value, _, _, past_length = node.inputs
        rotations = [_producer(query, "RotaryEmbedding"), _producer(key, "RotaryEmbedding")]
        products = [_producer(rotation.inputs[0], "MatMul") for rotation in rotations]
        products.append(_producer(value, "MatMul"))
        qkv = self._norm_linear(products, f"layers.{layer}.qkv", node)
        attributes = dict(node.attributes)
        attributes["layer"] = ir.AttrInt64("layer", layer)
        cos, sin = rotations[0].inputs[1], rotations[0].inputs[2]
        fused = ir.Node(
            DOMAIN, "CachedAttention", [qkv, cos, sin, past_length, self.session],
            attributes.values(), num_outputs=1, name=f"layers.{layer}.attention",
        )  # fmt: skip
        self.graph.insert_before(node, fused)
        ir.convenience.replace_all_uses_with(node.outputs[0], fused.outputs[0])
        self._linear_add(_product_of(fused.outputs[0]))

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
        for value in [v for v in self.graph.outputs if (v.name or "").startswith("present.")]:
            self.graph.outputs.remove(value)
        for value in [v for v in self.graph.inputs if (v.name or "").startswith("past_key_values.")]:
            if not any(user.domain == DOMAIN and user.op_type == OP for user, _ in value.uses()):
                self.graph.inputs.remove(value)
        for node in [n for n in self.graph if (n.domain, n.op_type) == (DOMAIN, OP)]:
            caches = node.inputs[3:5]
            self.graph.remove(node, safe=True)
            for cache in caches:
                assert cache is not None
                self.graph.inputs.remove(cache)


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
