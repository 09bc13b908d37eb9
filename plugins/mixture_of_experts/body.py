"""ONNX function body of ``cpm.MixtureOfExperts``: its specification in standard operators (opset 21).

Each expert runs on the rows that chose it, which may be none. Engines skip products without rows, so only the
weights of chosen experts are read.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset

from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.mixture_of_experts.spec import OP, MixtureOfExpertsSpec

cpm = Opset(DOMAIN, VERSION)


@script(cpm, default_opset=op)
def RouteTokens(router_logits, top_k: int):  # noqa: N802
    """The share of every expert in every row, (rows, E); 0 for those not chosen."""
    probability = op.Softmax(op.Flatten(router_logits, axis=2), axis=-1)
    best, experts = op.TopK(probability, op.Reshape(top_k, [1]), axis=-1)
    none = op.Expand(0.0, op.Shape(probability))
    return op.ScatterElements(none, experts, best / op.ReduceSum(best, [-1]), axis=1)


@script(cpm, default_opset=op)
def AddExpert(total, rows, shares, w1, w3, w2, expert: int):  # noqa: N802
    """total (rows, H) plus what one expert computes for the rows that have a share of it."""
    share = op.Gather(shares, op.Constant(value_int=expert), axis=1)
    mine = op.Transpose(op.NonZero(share))
    x = op.GatherND(rows, mine)
    gate = op.MatMul(x, op.Transpose(w1, perm=[1, 0]))
    inner = gate * op.Sigmoid(gate) * op.MatMul(x, op.Transpose(w3, perm=[1, 0]))
    output = op.MatMul(inner, op.Transpose(w2, perm=[1, 0])) * op.Unsqueeze(op.GatherND(share, mine), [1])
    return op.ScatterND(total, mine, output, reduction="add")


@script(cpm, default_opset=op)
def AddWholeExpert(total, rows, shares, w1, w3, w2, expert: int):  # noqa: N802
    """AddExpert with every row, most of which get a share of 0."""
    gate = op.MatMul(rows, op.Transpose(w1, perm=[1, 0]))
    inner = gate * op.Sigmoid(gate) * op.MatMul(rows, op.Transpose(w3, perm=[1, 0]))
    share = op.Gather(shares, op.Reshape(expert, [1]), axis=1)
    return total + op.MatMul(inner, op.Transpose(w2, perm=[1, 0])) * share


def functions(spec: MixtureOfExpertsSpec, *, opset: int = 21, whole: bool = False) -> list[ir.Function]:
    """The op's function and those it calls, fresh copies to put into a model.

    Args:
        spec: the number of experts decides the function's inputs.
        opset: the model's version of ai.onnx, 21 or later; the operators used did not change since.
        whole: run every expert on every row, for engines in which no shape may depend on data. All weights
            are then read for every token.
    """
    add = AddWholeExpert if whole else AddExpert
    parts = [ir.serde.deserialize_function(f.to_function_proto()) for f in (RouteTokens, add)]
    parts.append(_entry(spec, add.name))
    for function in parts:
        function.opset_imports[""] = opset
    return parts


def _entry(spec: MixtureOfExpertsSpec, add: str) -> ir.Function:
    """RouteTokens, then the function ``add`` for each expert in turn."""
    count = spec.num_experts
    x, logits = ir.Value(name="x"), ir.Value(name="router_logits")
    weights = [[ir.Value(name=f"{name}_{e}") for e in range(count)] for name in ("w1", "w3", "w2")]
    tape = ir.tape.Tape()
    top_k = ir.RefAttr("top_k", "top_k", ir.AttributeType.INT)
    route = ir.Node(DOMAIN, RouteTokens.name, [logits], [top_k], num_outputs=1)
    rows = tape.op("Flatten", [x], {"axis": 2})
    total = tape.op("Mul", [rows, tape.op("Constant", [], {"value_float": 0.0})])
    nodes = [route, *tape.nodes]
    for expert, (w1, w3, w2) in enumerate(zip(*weights, strict=True)):
        inputs = [total, rows, route.outputs[0], w1, w3, w2]
        index = ir.AttrInt64("expert", expert)
        nodes.append(ir.Node(DOMAIN, add, inputs, [index], num_outputs=1))
        total = nodes[-1].outputs[0]
    tape = ir.tape.Tape()
    output = tape.op("Reshape", [total, tape.op("Shape", [x])])
    graph = ir.Graph(
        [x, logits, *(weight for part in weights for weight in part)],
        [output],
        nodes=[*nodes, *tape.nodes],
        opset_imports={"": 21, DOMAIN: VERSION},
        name=OP,
    )
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in spec.attributes()]
    return ir.Function(DOMAIN, OP, graph=graph, attributes=declared)
