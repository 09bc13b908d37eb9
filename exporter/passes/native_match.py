"""Finding the parts of a traced graph that fuse; what is not as expected is an ExportError."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError


def producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        found = "an input" if node is None else node.op_type
        raise ExportError(f"internal: expected {op_type} before {value.name if value else '?'}, got {found}")
    return node


def only_user(value: ir.Value) -> ir.Node:
    users = [node for node, _ in value.uses()]
    if len(users) != 1:
        raise ExportError(f"internal: expected one use of {value.name}, got {len(users)}")
    return users[0]


def product_of(value: ir.Value) -> ir.Node:
    """The product that reads a value, maybe with its columns in another order."""
    user = only_user(value)
    return only_user(user.outputs[0]) if user.op_type == "Gather" else user


def only_user_of_type(value: ir.Value, op_type: str) -> ir.Node:
    user = only_user(value)
    if user.op_type != op_type:
        raise ExportError(f"internal: expected {op_type} after {value.name}, got {user.op_type}")
    return user


def unshaped(value: ir.Value | None) -> ir.Value | None:
    """The same numbers before a Reshape to heads, or from them."""
    return producer(value, "Reshape").inputs[0]


def weight_of(product: ir.Node) -> str:
    weight = producer(product.inputs[1], "Transpose").inputs[0]
    assert weight is not None and weight.name is not None
    return weight.name


def norm_of(product: ir.Node) -> tuple[ir.Node, float]:
    """The normalization before a product, and the constant factor between them."""
    value, scale = product.inputs[0], 1.0
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Div", "Mul"):
        factor = scalar(node)
        assert factor is not None
        scale = 1.0 / factor if node.op_type == "Div" else factor
        value = node.inputs[0]
    return producer(value, "RMSNormalization"), scale


def scalar(node: ir.Node) -> float | None:
    """The constant second operand of a node, None when it is not one."""
    constant = node.inputs[1].const_value if node.inputs[1] is not None else None
    return float(constant.numpy()) if constant is not None and constant.size == 1 else None


@dataclass(frozen=True)
class Branch:
    """residual + scale * value, which ``add`` computes."""

    add: ir.Node
    residual: ir.Value | None
    scale: float


def branch_of(value: ir.Value) -> Branch:
    """What a residual branch ends in: [Mul by a constant,] Add."""
    scale = 1.0
    user = only_user(value)
    factor = scalar(user) if user.op_type == "Mul" else None
    if factor is not None:
        value, scale = user.outputs[0], factor
    add = only_user_of_type(value, "Add")
    residual = add.inputs[0] if add.inputs[1] is value else add.inputs[1]
    return Branch(add, residual, scale)
