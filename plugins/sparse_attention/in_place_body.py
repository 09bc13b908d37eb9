"""ONNX function bodies of the plugin ``CpmSparseAttention``: what a device's kernels compute.

For checks on a host. Rows and caches are float16, the products of this statement float32. Pooled keys are
rounded to float16, as the plugin stores them; here they are made anew from the keys, which gives the same
rows wherever a window is complete.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op

from cpm_edge.plugins.sparse_attention.body import (
    SelectTokens,
    SparseAttend,
    SplitHeads,
    VisibleWindows,
    WriteRows,
    cpm,
)
from cpm_edge.plugins.sparse_attention.rows_out_body import GroupAttend

NAME = "CpmSparseAttention"


@script(cpm, default_opset=op)
def PoolHalfKeys(keys, kernel_stride: int):  # noqa: N802
    """As PoolKeys, but pooled keys k1 are rounded to float16, and coarse keys k2 are means of these."""
    shape = op.Concat([0, 0, -1], op.Reshape(kernel_stride, [1]), op.Shape(keys, start=3), axis=0)
    strides = op.ReduceMean(op.Reshape(keys, shape), [3], keepdims=0)
    sums = op.Slice(strides, [0], [-1], [2]) + op.Slice(strides, [1], [9223372036854775807], [2])
    k1 = op.Cast(op.Cast(sums * 0.5, to=10), to=1)
    tail = op.Expand(0.0, op.Concat(op.Shape(keys, start=0, end=2), [5], op.Shape(keys, start=3), axis=0))
    padded = op.Concat(k1, tail, axis=2)
    quads = op.Reshape(padded, op.Concat([0, 0, -1, 4], op.Shape(keys, start=3), axis=0))
    halves = op.Gather(quads, 0, axis=3) + op.Gather(quads, 2, axis=3)
    k2 = (op.Slice(halves, [0], [-1], [2]) + op.Slice(halves, [1], [9223372036854775807], [2])) * 0.25
    return k1, k2


@script(cpm, default_opset=op)
def InPlaceSparse(  # noqa: N802
    query,
    key,
    value,
    key_cache,
    value_cache,
    past_length,
    pooled_cache,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
    dense_len: int,
    coarse_lse: int,
):
    """Output and the three caches that hold the new rows."""
    past = op.Cast(past_length, to=7)
    present_key = WriteRows(key_cache, SplitHeads(key, heads=kv_num_heads), past)
    present_value = WriteRows(value_cache, SplitHeads(value, heads=kv_num_heads), past)
    keys = op.Cast(present_key, to=1)
    output = SparseAttend(
        op.Cast(query, to=1),
        keys,
        op.Cast(present_value, to=1),
        past,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        window_size=window_size,
        topk=topk,
        dense_len=dense_len,
        coarse_lse=coarse_lse,
    )
    k1, _ = PoolHalfKeys(keys, kernel_stride=kernel_stride)
    pooled = op.Cast(op.Concat(k1, op.Slice(k1, [0], [1], [2]) * 0.0, axis=2), to=10)
    return op.Cast(output, to=10), present_key, present_value, pooled


@script(cpm, default_opset=op)
def InPlaceDense(  # noqa: N802
    query, key, value, key_cache, value_cache, past_length, num_heads: int, kv_num_heads: int, scale: float
):
    """Output and the two caches that hold the new rows."""
    past = op.Cast(past_length, to=7)
    present_key = WriteRows(key_cache, SplitHeads(key, heads=kv_num_heads), past)
    present_value = WriteRows(value_cache, SplitHeads(value, heads=kv_num_heads), past)
    count = op.Squeeze(op.Shape(query, start=1, end=2))
    position = op.Unsqueeze(past + op.Range(0, count, 1), [1])
    output = GroupAttend(
        query,
        op.Cast(present_key, to=1),
        op.Cast(present_value, to=1),
        op.Range(0, op.Squeeze(op.Shape(key_cache, start=2, end=3)), 1) <= position,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    return op.Cast(output, to=10), present_key, present_value


def in_place_functions(*, dense: bool, opset: int = 21) -> list[ir.Function]:
    """The plugin's function, named as its node, and those it calls; fresh copies to put into a model.

    Args:
        opset: the model's version of ai.onnx, 21 or later; the operators used did not change since.
    """
    sparse = (PoolHalfKeys, VisibleWindows, SelectTokens, SparseAttend, InPlaceSparse)
    parts = (SplitHeads, WriteRows, *((GroupAttend, InPlaceDense) if dense else sparse))
    found = [ir.serde.deserialize_function(f.to_function_proto()) for f in parts]
    if not dense:
        pool = ir.serde.deserialize_function(PoolHalfKeys.to_function_proto())
        pool.name = "PoolKeys"  # the one that SelectTokens calls
        found.insert(0, pool)
    for function in found:
        function.opset_imports[""] = opset
    found[-1].name = NAME
    return found
