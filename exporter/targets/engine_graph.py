"""An engine-ready ONNX graph: what the targets jetson and rtx share.

The order of the passes: ports, weights, casts, attention, then the operators that the parser lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

from cpm_edge.exporter.configs.llama import CAPACITY, CacheShape
from cpm_edge.exporter.disk import disk_errors
from cpm_edge.exporter.passes.engine_ports import fix_ports, name_outputs, narrow_ids, take_embeddings
from cpm_edge.exporter.passes.engine_weights import EngineWeights
from cpm_edge.exporter.passes.float16 import HalfOp, narrow_products
from cpm_edge.exporter.passes.host_embedding import shared_table, stays_in_engine, write_table
from cpm_edge.exporter.passes.parser_ops import check_operators
from cpm_edge.exporter.passes.primitives import lower_to_opset_21
from cpm_edge.exporter.targets.common import BuildJob
from cpm_edge.exporter.weight_file import WeightFile
from cpm_edge.exporter.weights import EMBEDDING, HEAD

MODEL = "model.onnx"
DATA = "model.onnx.data"

MakeWeights = Callable[[ir.Graph, BuildJob, WeightFile], EngineWeights]


@dataclass(frozen=True)
class EngineForm:
    """How one flavour fills the graph.

    Attributes:
        weights: makes the writer of the tensors.
        half: what takes float16, by operator type; see ``narrow_products``.
        place_attention: replaces the attention nodes.
        rows_out: whether the graph returns only the new rows of keys and values.
    """

    weights: MakeWeights
    half: Mapping[str, HalfOp]
    place_attention: Callable[[ir.Model, BuildJob], None]
    rows_out: bool


def capacity_of(job: BuildJob) -> int:
    """Rows of a cache: ``max_context`` in whole blocks."""
    block = job.config.attention_spec(0).block_size
    return -(-job.max_context // block) * block


def write_graph(job: BuildJob, form: EngineForm) -> dict[str, Any] | None:
    """Lower the traced graph and write it with its data into ``job.folder``.

    Returns:
        The manifest's description of the host's embedding; None when the engine holds it.

    Raises:
        ExportError: a tensor or a graph that TensorRT does not take, or a disk error.
    """
    graph, config = job.model.graph, job.config
    caches = [config.layer_caches(layer) for layer in range(config.num_hidden_layers)]
    fix_ports(graph, caches, capacity_of(job))
    name_outputs(graph, rows_out=form.rows_out)
    tied = HEAD not in job.weights.shapes
    in_engine = stays_in_engine(job.weights.scheme(EMBEDDING), tied)
    half: set[ir.Value] = set()
    if in_engine:
        narrow_ids(graph)
    else:
        half.add(take_embeddings(graph, config.hidden_size))
    with WeightFile(job.folder / DATA) as file:
        weights = form.weights(graph, job, file)
        weights.run()
    table = None
    if not in_engine:
        table = shared_table(weights) if tied else write_table(job.weights, job.folder)
        if not tied:
            graph.initializers.pop(EMBEDDING)
            job.progress(job.weights.elements(EMBEDDING))
    narrow_products(graph, half | weights.half, form.half)
    form.place_attention(job.model, job)
    lower_to_opset_21(job.model)
    _tidy(job.model)
    check_operators(graph)
    with disk_errors(job.folder / MODEL):
        ir.save(job.model, job.folder / MODEL)
    return table


def inline_bodies(model: ir.Model, functions: list[ir.Function]) -> None:
    """Inline the functions of the attention nodes."""
    for function in functions:
        model.functions[function.identifier()] = function
    InlinePass()(model)
    model.functions.clear()


def _tidy(model: ir.Model) -> None:
    """Constants as initializers, equal nodes once, nothing unused, every name unique."""
    graph = model.graph
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    ports = {*graph.inputs, *graph.outputs}
    # TensorRT refuses two tensors of one name, and ONNX Runtime shapes that no longer hold.
    names: set[str] = {value.name or "" for value in ports} | set(graph.initializers)
    for node in graph:
        for index, value in enumerate(node.outputs):
            if value in ports:
                continue
            value.shape = value.type = None
            name = value.name if value.name and value.name != "_" else f"{node.op_type}_{index}"
            value.name = _unique(name, names)


def _unique(name: str, names: set[str]) -> str:
    candidate, count = name, 1
    while candidate in names:
        count += 1
        candidate = f"{name}_{count}"
    names.add(candidate)
    return candidate


def cached_bytes(job: BuildJob, pooled_stride: int = 0) -> int:
    """Bytes of all caches and states at full capacity; so many keys have a pooled one, none with 0."""
    capacity = capacity_of(job)
    caches = [job.config.layer_caches(layer) for layer in range(job.config.num_hidden_layers)]
    total = sum(_cache_bytes(shape, capacity) for ports in caches for shape in ports.values())
    if not pooled_stride:
        return total
    return total + sum(
        _cache_bytes(ports["key"], capacity) // pooled_stride for ports in caches if "key" in ports
    )


def _cache_bytes(shape: CacheShape, capacity: int) -> int:
    """float16 rows, or a float32 state."""
    sizes = [capacity if size == CAPACITY else int(size) for size in shape]
    return math.prod(sizes) * (2 if CAPACITY in shape else 4)
