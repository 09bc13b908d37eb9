"""Dense cpm.SparseAttention (topk 0) to OpenVINO's ScaledDotProductAttention over a growing cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def dense_attention() -> Callable[[Any], list[Any]]:
    """A converter for OpenVINO's ONNX front end.

    The caches are exactly past_length long. The shapes follow what the CPU plugin fuses into a stateful SDPA:
    Concat(state, new rows), and for grouped queries Unsqueeze, Multiply by f32 ones, Reshape.
    """
    import openvino.opset15 as ops

    masks: list[Any] = []

    def split(rows: Any, heads: int) -> Any:
        shaped = ops.reshape(rows, ops.constant(np.array([0, 0, heads, -1])), special_zero=True)
        return ops.transpose(shaped, ops.constant(np.array([0, 2, 1, 3])))

    def repeated(rows: Any, heads: int, group: int) -> Any:
        if group == 1:
            return rows
        spread = ops.unsqueeze(rows, ops.constant(np.array(2)))
        ones = ops.constant(np.ones((1, 1, group, 1, 1), np.float32))
        size = int(rows.get_partial_shape()[3].get_length())
        shape = ops.constant(np.array([0, heads, -1, size]))
        return ops.reshape(ops.multiply(spread, ones), shape, special_zero=True)

    def causal_mask(query: Any, keys: Any, past_length: Any) -> Any:
        """0 where key <= past_length + row, else the lowest float: (B, 1, T, S), shared by all layers."""
        if not masks:
            zero, one, axis = (ops.constant(np.array(v)) for v in (0, 1, 0))
            rows = ops.gather(ops.shape_of(query), ops.constant(np.array(2)), axis)
            columns = ops.gather(ops.shape_of(keys), ops.constant(np.array(2)), axis)
            offset = ops.range(zero, rows, one, "i64")
            position = ops.add(ops.unsqueeze(past_length, ops.constant(np.array([1]))), offset)
            position = ops.unsqueeze(position, ops.constant(np.array([1, 3])))
            visible = ops.less_equal(ops.range(zero, columns, one, "i64"), position)
            lowest = ops.constant(np.float32(np.finfo(np.float32).min))
            masks.append(ops.select(visible, ops.constant(np.float32(0)), lowest))
        return masks[0]

    def convert(node: Any) -> list[Any]:
        query, key, value, key_cache, value_cache, past_length = (node.get_input(i) for i in range(6))
        heads, kv_heads = node.get_attribute("num_heads"), node.get_attribute("kv_num_heads")
        present_key = ops.concat([key_cache, split(key, kv_heads)], 2)
        present_value = ops.concat([value_cache, split(value, kv_heads)], 2)
        split_query = split(query, heads)
        mask = causal_mask(split_query, present_key, past_length)
        group = heads // kv_heads
        attended = ops.scaled_dot_product_attention(
            split_query,
            repeated(present_key.output(0), heads, group),
            repeated(present_value.output(0), heads, group),
            mask,
            ops.constant(np.float32(node.get_attribute("scale"))),
        )
        merged = ops.reshape(
            ops.transpose(attended, ops.constant(np.array([0, 2, 1, 3]))),
            ops.constant(np.array([0, 0, -1])),
            special_zero=True,
        )
        return [merged.output(0), present_key.output(0), present_value.output(0)]

    return convert
