"""The inputs other people's runtimes feed: attention_mask in place of past_length."""

from __future__ import annotations

import onnx_ir as ir

from cpm_edge.exporter.passes.builder import Builder


def past_from_attention_mask(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Replace the input ``past_length`` by the length of ``attention_mask`` (batch, total).

    Only the mask's length counts: all rows of a batch have it.

    Returns:
        total and past length, int64 (1,) each.
    """
    past_input = next(value for value in graph.inputs if value.name == "past_length")
    input_ids = next(value for value in graph.inputs if value.name == "input_ids")
    mask = ir.Value(
        name="attention_mask",
        shape=ir.Shape(["batch", "total"]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    builder = Builder(graph)
    total = builder.op("Shape", [mask], {"start": 1, "end": 2}, name="total_length")
    rows = builder.op("Shape", [input_ids], {"start": 1, "end": 2}, name="new_length")
    batch = builder.op("Shape", [input_ids], {"start": 0, "end": 1}, name="batch_size")
    past = builder.op("Sub", [total, rows], name="past_rows")
    per_row = builder.op("Expand", [past, batch], name="past_length")
    builder.insert_first()
    ir.convenience.replace_all_uses_with(past_input, per_row)
    graph.inputs[graph.inputs.index(past_input)] = mask
    return total, past
