"""ONNX function bodies of the latent form of ``cpm.SparseAttention``, in standard operators (opset 21).

    LatentAttention         writes the new rows into a buffer of fixed capacity (ONNX Runtime)
    LatentAttentionGrow     appends them to a cache that is exactly past_length long (OpenVINO state)
    LatentAttend            the core: two products of all heads at once with the one cache they share

Scores of all new rows against the whole cache are in memory at once, 4 * heads * T * S bytes, three times.
The second product runs over whole rows and drops the columns that are no values, which costs less than a copy
of the cache without them.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op

from cpm_edge.plugins.sparse_attention.body import LOWEST, SplitHeads, WriteRows, cpm


@script(cpm, default_opset=op)
def LatentAttend(query, keys, past_length, num_heads: int, scale: float, v_head_size: int):  # noqa: N802
    """Output (B, T, num_heads * Dv) over keys (B, 1, S, D) that hold the new rows."""
    shared = op.Squeeze(keys, [1])
    length = op.Shape(keys, start=2, end=3)
    stacked = op.Reshape(query * scale, op.Concat([0, -1], op.Shape(keys, start=3), axis=0))
    scores = op.MatMul(stacked, op.Transpose(shared, perm=[0, 2, 1]))

    count = op.Squeeze(op.Shape(query, start=1, end=2))
    position = op.Unsqueeze(op.Unsqueeze(past_length, [1]) + op.Range(0, count, 1), [2, 3])
    visible = op.Range(0, op.Squeeze(length), 1) <= position
    heads = op.Reshape(num_heads, [1])
    by_row = op.Reshape(scores, op.Concat([0, -1], heads, length, axis=0))
    weights = op.Softmax(op.Where(visible, by_row, LOWEST), axis=-1)

    mixed = op.MatMul(op.Reshape(weights, op.Concat([0, -1], length, axis=0)), shared)
    size = op.Reshape(v_head_size, [1])
    return op.Reshape(op.Slice(mixed, [0], size, [2]), op.Concat([0, -1], heads * size, axis=0))


@script(cpm, default_opset=op)
def LatentAttention(  # noqa: N802
    query, key, value, key_cache, value_cache, past_length, num_heads: int, scale: float, v_head_size: int
):
    """The op over a buffer of fixed capacity, of which only the valid rows are read."""
    present = WriteRows(key_cache, SplitHeads(key, heads=1), past_length)
    longest = op.ReduceMax(past_length, keepdims=1) + op.Shape(query, start=1, end=2)
    valid = op.Slice(present, [0], longest, [2])
    output = LatentAttend(
        query, valid, past_length, num_heads=num_heads, scale=scale, v_head_size=v_head_size
    )
    return output, present


@script(cpm, default_opset=op)
def LatentAttentionGrow(  # noqa: N802
    query, key, value, key_cache, value_cache, past_length, num_heads: int, scale: float, v_head_size: int
):
    """The op over a cache that is exactly past_length long; the new rows are appended."""
    present = op.Concat(key_cache, SplitHeads(key, heads=1), axis=2)
    output = LatentAttend(
        query, present, past_length, num_heads=num_heads, scale=scale, v_head_size=v_head_size
    )
    return output, present


def latent_functions(*, grow: bool = False, opset: int = 21) -> list[ir.Function]:
    """The op's function and those it calls; arguments as for ``body.functions``."""
    entries = (LatentAttentionGrow,) if grow else (WriteRows, LatentAttention)
    parts = (SplitHeads, LatentAttend, *entries)
    found = [ir.serde.deserialize_function(f.to_function_proto()) for f in parts]
    for function in found:
        function.opset_imports[""] = opset
    found[-1].name = "SparseAttention"
    return found
