"""Inputs and outputs of a TensorRT engine: one sequence, caches of fixed capacity, positions as data.

Nothing of the position enters a shape, so one captured graph decodes every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from cpm_edge.exporter.configs.llama import CAPACITY, CacheShape
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.weights import EMBEDDING
from cpm_edge.runtimes.cache_layout import STATE

ROWS, LOGIT_ROWS = "sequence", "rows"
PAST_LENGTH = "past_length"


def fix_ports(graph: ir.Graph, caches: Sequence[Mapping[str, CacheShape]], capacity: int) -> None:
    """Give the traced inputs the engine's types and shapes, and choose rows of logits by index.

    Args:
        graph: changed in place: ``past_length`` becomes int32 (1,), ``logits_from`` the input ``logit_rows``
            int32 (R,), caches float16 (1, heads, capacity, size), states float32.
        caches: of each layer, ``config.layer_caches``.
        capacity: rows of a cache.
    """
    builder = Builder(graph)
    past = _input(graph, PAST_LENGTH)
    past.name = "past_length_int64"
    narrow = _value(PAST_LENGTH, [1], ir.DataType.INT32)
    wide = builder.op("Cast", [narrow], {"to": ir.DataType.INT64.value}, name="past_length_int64")
    ir.convenience.replace_all_uses_with(past, wide)
    graph.inputs[graph.inputs.index(past)] = narrow
    builder.insert_first()
    _choose_logit_rows(graph)
    for layer, ports in enumerate(caches):
        for port, shape in ports.items():
            value = _input(graph, f"past_key_values.{layer}.{port}")
            value.shape = ir.Shape([1, *(capacity if size == CAPACITY else int(size) for size in shape)])
            value.type = ir.TensorType(ir.DataType.FLOAT if port == STATE else ir.DataType.FLOAT16)


def name_outputs(graph: ir.Graph, *, rows_out: bool) -> None:
    """Types and shapes of ``present.N.PORT``: those of the input that it follows.

    Args:
        rows_out: keys and values are ``new.N.PORT`` instead: the rows of this step alone.
    """
    inputs = {value.name: value for value in graph.inputs}
    for value in graph.outputs:
        _, _, place = (value.name or "").partition("present.")
        before = inputs.get(f"past_key_values.{place}")
        if before is None or before.shape is None:
            continue
        sizes: list[Any] = list(before.shape)
        if rows_out and not place.endswith(STATE):
            value.name, sizes[2] = f"new.{place}", ROWS
        value.shape, value.type = ir.Shape(sizes), before.type


def _choose_logit_rows(graph: ir.Graph) -> None:
    """A Gather instead of the Slice in front of the head."""
    start = _input(graph, "logits_from")
    ((cut, _),) = start.uses()
    rows = _value("logit_rows", [LOGIT_ROWS], ir.DataType.INT32)
    builder = Builder(graph)
    builder.op("Gather", [cut.inputs[0], rows], {"axis": 1}, name="hidden_rows")
    ir.convenience.replace_nodes_and_values(
        graph, cut, [cut], builder.nodes, cut.outputs, builder.nodes[-1].outputs
    )
    graph.inputs[graph.inputs.index(start)] = rows
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    logits.shape = ir.Shape([1, LOGIT_ROWS, logits.shape[2]])


def narrow_ids(graph: ir.Graph) -> None:
    """``input_ids`` as int32 (1, T), for an engine that holds the embedding."""
    ids = _input(graph, "input_ids")
    ids.shape, ids.type = ir.Shape([1, ROWS]), ir.TensorType(ir.DataType.INT32)


def take_embeddings(graph: ir.Graph, hidden_size: int) -> ir.Value:
    """Replace ``input_ids`` and their lookup by ``inputs_embeds`` float16 (1, T, hidden).

    Returns:
        The input.
    """
    ids = _input(graph, "input_ids")
    lookup = next(node for node, _ in graph.initializers[EMBEDDING].uses() if node.op_type == "Gather")
    embeds = _value("inputs_embeds", [1, ROWS, hidden_size], ir.DataType.FLOAT16)
    ir.convenience.replace_all_uses_with(lookup.outputs[0], embeds)
    graph.remove(lookup, safe=True)
    ir.convenience.replace_all_uses_with(ids, embeds)  # whose remaining users ask for the number of rows
    graph.inputs[graph.inputs.index(ids)] = embeds
    return embeds


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _value(name: str, shape: list[int | str], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
