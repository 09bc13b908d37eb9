"""ONNX function bodies of ``cpm.SparseAttention``: its specification in standard operators (opset 21).

Three functions over one core, because runtimes keep the cache differently:
    SparseAttention         writes the new rows into a buffer of fixed capacity (ONNX Runtime)
    SparseAttentionGrow     appends the new rows to a cache that is exactly past_length long (OpenVINO state)
    SparseAttend            the core: scores, selection and softmax over a cache that holds the new rows

They compute every score and mask what is not selected: correct and portable, not fast. Masks use a finite
minimum, and the windows are counted from the capacity, so that no tensor is ever empty.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset

from cpm_edge.plugins import DOMAIN, VERSION

cpm = Opset(DOMAIN, VERSION)

LOWEST = -1.0e30
FORCED = 3.0e38


@script(cpm, default_opset=op)
def SplitHeads(rows, heads: int):  # noqa: N802
    """(B, T, heads * D) to (B, heads, T, D)."""
    shape = op.Concat([0, 0], op.Reshape(heads, [1]), [-1], axis=0)
    return op.Transpose(op.Reshape(rows, shape), perm=[0, 2, 1, 3])


@script(cpm, default_opset=op)
def WriteRows(cache, rows, past_length):  # noqa: N802
    """The cache (B, H, C, D) with rows (B, H, T, D) at [past_length, past_length + T)."""
    count = op.Squeeze(op.Shape(rows, start=2, end=3))
    index = op.Unsqueeze(past_length, [1]) + op.Range(0, count, 1)
    index = op.Expand(op.Unsqueeze(index, [1, 3]), op.Shape(rows))
    return op.ScatterElements(cache, index, rows, axis=2)


@script(cpm, default_opset=op)
def PoolKeys(keys, kernel_stride: int):  # noqa: N802
    """Pooled keys k1 (B, H, 4 N - 1, D) and coarse keys k2 (B, H, N, D) of N blocks of keys.

    A window is two strides, so its mean is the mean of two neighbouring stride means; four pooled keys, two
    apart, tile a coarse window.
    """
    shape = op.Concat([0, 0, -1], op.Reshape(kernel_stride, [1]), op.Shape(keys, start=3), axis=0)
    strides = op.ReduceMean(op.Reshape(keys, shape), [3], keepdims=0)
    k1 = (op.Slice(strides, [0], [-1], [2]) + op.Slice(strides, [1], [9223372036854775807], [2])) * 0.5
    tail = op.Expand(0.0, op.Concat(op.Shape(keys, start=0, end=2), [5], op.Shape(keys, start=3), axis=0))
    padded = op.Concat(k1, tail, axis=2)
    quads = op.Reshape(padded, op.Concat([0, 0, -1, 4], op.Shape(keys, start=3), axis=0))
    halves = op.Gather(quads, 0, axis=3) + op.Gather(quads, 2, axis=3)
    k2 = (op.Slice(halves, [0], [-1], [2]) + op.Slice(halves, [1], [9223372036854775807], [2])) * 0.25
    return k1, k2


@script(cpm, default_opset=op)
def VisibleWindows(windows, position, kernel, stride):  # noqa: N802
    """Which windows (B, H, W, D) are complete at position (B, T, 1): bool (B, 1, 1, T, W)."""
    index = op.Range(0, op.Squeeze(op.Shape(windows, start=2, end=3)), 1)
    return op.Unsqueeze(index * stride + kernel <= position + 1, [1, 2])


@script(cpm, default_opset=op)
def SelectTokens(  # noqa: N802
    query,
    keys,
    position,
    scale: float,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
    coarse_lse: int,
):
    """Tokens in the chosen blocks: bool (B, H, 1, T, C) for query (B, H, G, T, D), keys (B, H, C, D)."""
    k1, k2 = PoolKeys(keys, kernel_stride=kernel_stride)
    factor = scale
    s1 = op.MatMul(query, op.Unsqueeze(op.Transpose(k1, perm=[0, 1, 3, 2]), [2])) * factor
    s2 = op.MatMul(query, op.Unsqueeze(op.Transpose(k2, perm=[0, 1, 3, 2]), [2])) * factor
    kernel = op.Identity(kernel_size)
    stride = op.Identity(kernel_stride)
    seen1 = VisibleWindows(k1, position, kernel, stride)
    seen2 = VisibleWindows(k2, position, kernel * 4, stride * 4)
    m1 = op.ReduceMax(op.Where(seen1, s1, LOWEST), [-1])
    m2 = op.ReduceMax(op.Where(seen2, s2, LOWEST), [-1])
    l1 = op.ReduceSum(op.Where(seen1, op.Exp(op.Min(s1 - m1, 0.0)), 0.0), [-1])
    l2 = op.ReduceSum(op.Where(seen2, op.Exp(op.Min(s2 - m2, 0.0)), 0.0), [-1])
    any_coarse = op.Unsqueeze(kernel * 4 <= position + 1, [1, 2])
    coarse = op.And(any_coarse, coarse_lse > 0)
    top = op.Where(coarse, m2, m1)
    total = op.Max(op.Where(coarse, l2, l1), 1.0e-30)
    probability = op.Where(seen1, op.Exp(op.Min(s1 - top, 80.0)) / total, 0.0)
    shared = op.ReduceSum(probability, [2], keepdims=0)

    # One zero in front makes the windows of block b the quad b and the first of quad b + 1.
    edge = op.Slice(shared, [0], [1], [-1]) * 0.0
    quads = op.Reshape(op.Concat(edge, shared, axis=-1), [0, 0, 0, -1, 4])
    first = op.Concat(op.Squeeze(op.Slice(quads, [0], [1], [-1]), [-1]), edge, axis=-1)
    after = op.Slice(first, [1], [9223372036854775807], [-1])
    score = op.Max(op.ReduceMax(quads, [-1], keepdims=0), after)

    size = block_size
    blocks = op.Shape(score, start=3)
    block = op.Range(0, op.Squeeze(blocks), 1)
    current = position / size
    local = window_size / size
    forced = op.Or(block < init_blocks, block >= current - local)
    score = op.Where(op.Unsqueeze(forced, [1]), FORCED, score)
    score = op.Where(op.Unsqueeze(block <= current, [1]), score, -1.0)
    budget = op.Reshape(topk, [1]) + op.Unsqueeze(local, [0])
    _, chosen = op.TopK(score, op.Min(budget, blocks))
    mask = op.ScatterElements(
        op.Expand(0.0, op.Shape(score)), chosen, op.Expand(1.0, op.Shape(chosen)), axis=-1
    )
    repeated = op.Expand(op.Unsqueeze(mask, [-1]), op.Concat([1, 1, 1, 1], op.Unsqueeze(size, [0]), axis=0))
    return op.Unsqueeze(op.Reshape(repeated, [0, 0, 0, -1]) > 0.5, [2])


@script(cpm, default_opset=op)
def SparseAttend(  # noqa: N802
    query,
    keys,
    values,
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
    """Output (B, T, num_heads * D) over keys, values (B, kv_num_heads, C, D) that hold the new rows."""
    kv_heads = op.Reshape(kv_num_heads, [1])
    group = op.Reshape(num_heads, [1]) / kv_heads
    split = op.Concat([0, 0], kv_heads, group, [-1], axis=0)
    heads = op.Transpose(op.Reshape(query, split), perm=[0, 2, 3, 1, 4])
    count = op.Squeeze(op.Shape(query, start=1, end=2))
    position = op.Unsqueeze(op.Unsqueeze(past_length, [1]) + op.Range(0, count, 1), [2])
    chosen = SelectTokens(
        heads,
        keys,
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
    always = topk == 0
    dense = op.Unsqueeze(op.Or(position + 1 < dense_len, always), [1, 2])
    visible = op.And(causal, op.Or(dense, chosen))
    transposed = op.Unsqueeze(op.Transpose(keys, perm=[0, 1, 3, 2]), [2])
    scores = op.MatMul(heads, transposed) * scale
    weights = op.Softmax(op.Where(visible, scores, LOWEST), axis=-1)
    attended = op.MatMul(weights, op.Unsqueeze(values, [2]))
    return op.Reshape(op.Transpose(attended, perm=[0, 3, 1, 2, 4]), [0, 0, -1])


@script(cpm, default_opset=op)
def SparseAttention(  # noqa: N802
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
    """The op over buffers of fixed capacity, a multiple of block_size."""
    present_key = WriteRows(key_cache, SplitHeads(key, heads=kv_num_heads), past_length)
    present_value = WriteRows(value_cache, SplitHeads(value, heads=kv_num_heads), past_length)
    output = SparseAttend(
        query,
        present_key,
        present_value,
        past_length,
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
    return output, present_key, present_value


@script(cpm, default_opset=op)
def PadToBlock(rows, block_size: int):  # noqa: N802
    """Rows (B, H, S, D) with 1 to block_size zero rows behind them: a whole number of blocks."""
    size = op.Reshape(block_size, [1])
    missing = size - op.Mod(op.Shape(rows, start=2, end=3), size)
    tail = op.Expand(0.0, op.Concat(op.Shape(rows, start=0, end=2), missing, op.Shape(rows, start=3), axis=0))
    return op.Concat(rows, tail, axis=2)


@script(cpm, default_opset=op)
def SparseAttentionGrow(  # noqa: N802
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
    """The op over caches that are exactly past_length long; the new rows are appended."""
    present_key = op.Concat(key_cache, SplitHeads(key, heads=kv_num_heads), axis=2)
    present_value = op.Concat(value_cache, SplitHeads(value, heads=kv_num_heads), axis=2)
    output = SparseAttend(
        query,
        PadToBlock(present_key, block_size=block_size),
        PadToBlock(present_value, block_size=block_size),
        past_length,
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
    return output, present_key, present_value


_PARTS = (SplitHeads, WriteRows, PoolKeys, VisibleWindows, SelectTokens, SparseAttend)


def functions(*, grow: bool = False, opset: int = 21) -> list[ir.Function]:
    """The op's function and those it calls, fresh copies to put into a model.

    Args:
        grow: the appending form; it takes the op's name, so nodes need not change.
        opset: the model's version of ai.onnx, 21 or later; the operators used did not change since.
    """
    entry, extra = (SparseAttentionGrow, (PadToBlock,)) if grow else (SparseAttention, ())
    found = [ir.serde.deserialize_function(f.to_function_proto()) for f in (*_PARTS, *extra, entry)]
    for function in found:
        function.opset_imports[""] = opset
    found[-1].name = "SparseAttention"
    return found
