"""ONNX function bodies of ``cpm.SparseAttention`` for engines of fixed capacity, opset 21, strongly typed.

Caches (1, H, C, D) are float16 and only read: each function returns the new rows (1, H, T, D), which the
runtime copies into its buffers. Products run in float16, softmax and the choice of blocks in float32.

    DenseRows       attends over Concat(cache, new rows)
    SparseRows      puts the new rows into their places first, since pooled keys span neighbours
    LatentRows      DenseRows of the latent form
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op

from cpm_edge.plugins.sparse_attention.body import (
    LOWEST,
    PoolKeys,
    SelectTokens,
    SplitHeads,
    VisibleWindows,
    WriteRows,
    cpm,
)
from cpm_edge.plugins.sparse_attention.spec import OP, SparseAttentionSpec


@script(cpm, default_opset=op)
def VisibleRows(cache, rows, past_length):  # noqa: N802
    """Which rows of Concat(cache, rows) each new row sees: bool (T, C + T)."""
    capacity = op.Squeeze(op.Shape(cache, start=2, end=3))
    count = op.Squeeze(op.Shape(rows, start=2, end=3))
    index = op.Range(0, capacity + count, 1)
    row = op.Unsqueeze(op.Range(0, count, 1), [1])
    new = op.And(index >= capacity, index - capacity <= row)
    return op.Or(index < past_length, new)


@script(cpm, default_opset=op)
def GroupAttend(query, keys, values, visible, num_heads: int, kv_num_heads: int, scale: float):  # noqa: N802
    """Output (1, T, num_heads * D) of query (1, T, num_heads * D) over keys, values (1, kv_num_heads, S, D).

    Products are of the type of keys and values, softmax is float32. ``visible`` is bool and broadcasts to
    (kv_num_heads, group, T, S).
    """
    kv_heads = op.Reshape(kv_num_heads, [1])
    group = op.Reshape(num_heads, [1]) / kv_heads
    count = op.Shape(query, start=1, end=2)
    length = op.Shape(keys, start=2, end=3)
    scaled = op.CastLike(op.Cast(query, to=1) * scale, keys)
    split = op.Reshape(scaled, op.Concat(count, kv_heads, group, [-1], axis=0))
    heads = op.Transpose(split, perm=[1, 2, 0, 3])
    stacked = op.Reshape(heads, op.Concat([1], kv_heads, [-1], op.Shape(keys, start=3), axis=0))
    scores = op.Cast(op.MatMul(stacked, op.Transpose(keys, perm=[0, 1, 3, 2])), to=1)
    by_head = op.Reshape(scores, op.Concat(kv_heads, group, count, length, axis=0))
    weights = op.CastLike(op.Softmax(op.Where(visible, by_head, LOWEST), axis=-1), values)
    mixed = op.MatMul(op.Reshape(weights, op.Concat([1], kv_heads, [-1], length, axis=0)), values)
    apart = op.Reshape(mixed, op.Concat(kv_heads, group, count, [-1], axis=0))
    return op.Reshape(op.Transpose(apart, perm=[2, 0, 1, 3]), op.Concat([1], count, [-1], axis=0))


@script(cpm, default_opset=op)
def DenseRows(  # noqa: N802
    query, key, value, key_cache, value_cache, past_length, num_heads: int, kv_num_heads: int, scale: float
):
    """Output and the new rows of keys and values."""
    new_key = SplitHeads(key, heads=kv_num_heads)
    new_value = SplitHeads(value, heads=kv_num_heads)
    output = GroupAttend(
        query,
        op.Concat(key_cache, new_key, axis=2),
        op.Concat(value_cache, new_value, axis=2),
        VisibleRows(key_cache, new_key, past_length),
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
    )
    return output, new_key, new_value


@script(cpm, default_opset=op)
def SparseRows(  # noqa: N802
    query,
    key,
    value,
    key_cache,
    value_cache,
    past_length,
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
    """Output and the new rows of keys and values; every score is computed, and masked where not selected."""
    new_key = SplitHeads(key, heads=kv_num_heads)
    new_value = SplitHeads(value, heads=kv_num_heads)
    keys = WriteRows(key_cache, new_key, past_length)
    values = WriteRows(value_cache, new_value, past_length)
    kv_heads = op.Reshape(kv_num_heads, [1])
    group = op.Reshape(num_heads, [1]) / kv_heads
    split = op.Reshape(op.Cast(query, to=1), op.Concat([0, 0], kv_heads, group, [-1], axis=0))
    count = op.Squeeze(op.Shape(query, start=1, end=2))
    position = op.Unsqueeze(op.Unsqueeze(past_length, [1]) + op.Range(0, count, 1), [2])
    chosen = SelectTokens(
        op.Transpose(split, perm=[0, 2, 3, 1, 4]),
        op.Cast(keys, to=1),
        position,
        scale=scale,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        window_size=window_size,
        topk=topk,
        coarse_lse=coarse_lse,
    )
    token = op.Range(0, op.Squeeze(op.Shape(keys, start=2, end=3)), 1)
    causal = op.Unsqueeze(token <= position, [1, 2])
    dense = op.Unsqueeze(position + 1 < dense_len, [1, 2])
    visible = op.Squeeze(op.And(causal, op.Or(dense, chosen)), [0])
    output = GroupAttend(
        query, keys, values, visible, num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale
    )
    return output, new_key, new_value


@script(cpm, default_opset=op)
def LatentRows(  # noqa: N802
    query, key, value, key_cache, value_cache, past_length, num_heads: int, scale: float, v_head_size: int
):
    """Output (1, T, num_heads * v_head_size) and the new rows; a row's first columns are its value."""
    new_key = SplitHeads(key, heads=1)
    keys = op.Concat(key_cache, new_key, axis=2)
    values = op.Slice(keys, [0], op.Reshape(v_head_size, [1]), [3])
    visible = VisibleRows(key_cache, new_key, past_length)
    output = GroupAttend(query, keys, values, visible, num_heads=num_heads, kv_num_heads=1, scale=scale)
    return output, new_key


def rows_out_functions(spec: SparseAttentionSpec, *, opset: int = 21) -> list[ir.Function]:
    """The op's function for these attributes and those it calls, fresh copies to put into a model.

    Args:
        opset: the model's version of ai.onnx, 21 or later; the operators used did not change since.
    """
    if spec.is_latent:
        parts = (SplitHeads, VisibleRows, GroupAttend, LatentRows)
    elif spec.is_dense:
        parts = (SplitHeads, VisibleRows, GroupAttend, DenseRows)
    else:
        parts = (SplitHeads, WriteRows, PoolKeys, VisibleWindows, SelectTokens, GroupAttend, SparseRows)
    found = [ir.serde.deserialize_function(f.to_function_proto()) for f in parts]
    for function in found:
        function.opset_imports[""] = opset
    found[-1].name = OP
    return found
