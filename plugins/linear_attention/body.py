"""ONNX function body of ``cpm.LinearAttention``: its specification in standard operators (opset 21).

Rows are cut into chunks of min(T, 64), so that a single row is one chunk of one row. Within a chunk the
products of queries and keys are weighted by their decay; the states at the borders b_0 = 0, b_1, ... are
one product with a lower triangular matrix, where A_0 is past_state and A_m what chunk m adds up to its end:

    S(b_n) = sum over m <= n of e^{g (b_n - b_m)} A_m

All exponents are 0 or less, whatever the decay. Rows that fill up the last chunk have keys of 0, and the last
border is T, so nothing of them enters the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset

from cpm_edge.plugins import DOMAIN, VERSION

cpm = Opset(DOMAIN, VERSION)

CHUNK = 64


@script(cpm, default_opset=op)
def DecayBetween(decay, later, earlier):  # noqa: N802
    """e^{decay (later - earlier)}, and 0 where later comes before earlier; positions are int64."""
    distance = op.Cast(later - earlier, to=1)
    return op.Where(distance < 0.0, 0.0, op.Exp(decay * op.Max(distance, 0.0)))


@script(cpm, default_opset=op)
def SplitChunks(rows, heads, chunk, missing):  # noqa: N802
    """(B, T, heads * D) to (B, heads, chunks, chunk, D), with ``missing`` rows of 0 at the end."""
    padded = op.Pad(rows, op.Concat([0, 0, 0, 0], missing, [0], axis=0), 0.0)
    split = op.Reshape(padded, op.Concat([0, -1], chunk, heads, op.Shape(rows, start=2) / heads, axis=0))
    return op.Transpose(split, perm=[0, 3, 1, 2, 4])


@script(cpm, default_opset=op)
def LinearAttend(query, key, value, past_state, decay, scale: float):  # noqa: N802
    """The op with its decays (H,) as an input."""
    rows = op.Shape(query, start=1, end=2)
    heads = op.Shape(past_state, start=1, end=2)
    chunk = op.Min(rows, CHUNK)
    count = (rows + chunk - 1) / chunk
    missing = count * chunk - rows
    q = SplitChunks(query, heads, chunk, missing)
    k = SplitChunks(key, heads, chunk, missing)
    v = SplitChunks(value, heads, chunk, missing)
    g = op.Reshape(decay, [-1, 1, 1, 1])

    row = op.Range(0, op.Squeeze(chunk), 1)
    within = DecayBetween(g, op.Unsqueeze(row, [1]), row)  # (H, 1, chunk, chunk)
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])) * within
    border = op.Min(op.Range(0, op.Squeeze(count) + 1, 1) * chunk, rows)  # (chunks + 1,)
    last = op.Unsqueeze(op.Slice(border, [1], [9223372036854775807]) - 1, [1])
    position = op.Unsqueeze(op.Slice(border, [0], [-1]), [1]) + row
    to_end = DecayBetween(g, op.Unsqueeze(last, [2]), op.Unsqueeze(position, [2]))  # (H, chunks, chunk, 1)
    added = op.MatMul(op.Transpose(k * to_end, perm=[0, 1, 2, 4, 3]), v)

    parts = op.Concat(op.Unsqueeze(past_state, [2]), added, axis=2)  # (B, H, chunks + 1, D, Dv)
    between = op.Squeeze(DecayBetween(g, op.Unsqueeze(border, [1]), border), [1])
    flat = op.MatMul(between, op.Reshape(parts, [0, 0, 0, -1]))
    states = op.Reshape(flat, op.Shape(parts))
    before = op.Slice(states, [0], [-1], [2])
    from_start = DecayBetween(g, op.Unsqueeze(row + 1, [1]), 0)  # (H, 1, chunk, 1)
    chunks = op.MatMul(scores, v) + op.MatMul(q * from_start, before)
    ordered = op.Transpose(chunks, perm=[0, 2, 3, 1, 4])
    merged = op.Reshape(ordered, op.Concat([0, -1], op.Shape(value, start=2), axis=0))
    output = op.Slice(merged, [0], rows, [1]) * scale
    present_state = op.Squeeze(op.Slice(states, [-1], [9223372036854775807], [2]), [2])
    return output, present_state


@script(cpm, default_opset=op)
def LinearAttention(query, key, value, past_state, decay: Sequence[float], scale: float):  # noqa: N802
    """Output (B, T, H * Dv) and present_state (B, H, D, Dv)."""
    logarithms = op.Constant(value_floats=decay)
    output, present_state = LinearAttend(query, key, value, past_state, logarithms, scale=scale)
    return output, present_state


@script(cpm, default_opset=op)
def CpmLinearAttention(query, key, value, past_state, decay, scale: float):  # noqa: N802
    """The plugin of TensorRT: float16 rows, float32 state, decays and output."""
    q, k, v = op.Cast(query, to=1), op.Cast(key, to=1), op.Cast(value, to=1)
    output, present_state = LinearAttend(q, k, v, past_state, decay, scale=scale)
    return output, present_state


def functions(*, opset: int = 21, plugin: bool = False) -> list[ir.Function]:
    """The op's function and those it calls, fresh copies to put into a model.

    Args:
        opset: the model's version of ai.onnx, 21 or later; the operators used did not change since.
        plugin: the function CpmLinearAttention instead.
    """
    parts = (DecayBetween, SplitChunks, LinearAttend, CpmLinearAttention if plugin else LinearAttention)
    found = [ir.serde.deserialize_function(f.to_function_proto()) for f in parts]
    for function in found:
        function.opset_imports[""] = opset
    return found
