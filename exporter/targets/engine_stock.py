"""The plugin-free flavour: attention and linear attention written out, integers as DequantizeLinear."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from cpm_edge.exporter.configs import MiniCPMMoEConfig
from cpm_edge.exporter.passes.engine_weights import EngineWeights
from cpm_edge.exporter.passes.float16 import HalfOp
from cpm_edge.exporter.targets.common import BuildJob
from cpm_edge.exporter.targets.engine_graph import EngineForm, inline_bodies
from cpm_edge.exporter.weight_file import WeightFile
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.linear_attention.body import functions as linear_functions
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.mixture_of_experts.spec import OP as EXPERTS
from cpm_edge.plugins.sparse_attention.rows_out_body import rows_out_functions
from cpm_edge.plugins.sparse_attention.spec import OP as SPARSE
from cpm_edge.runtimes.cache_layout import STATE

INLINED = "written out in standard operators"


def _weights(graph: ir.Graph, job: BuildJob, file: WeightFile) -> EngineWeights:
    return EngineWeights(graph, job.weights, file, job.progress)


def _place_attention(model: ir.Model, job: BuildJob) -> None:
    graph, spec = model.graph, job.config.attention_spec(0)
    bodies = rows_out_functions(spec, opset=graph.opset_imports[""])
    if any(node.op_type == LINEAR for node in graph):
        bodies += linear_functions(opset=graph.opset_imports[""])
    inline_bodies(model, bodies)


def stock_ops(job: BuildJob) -> list[dict[str, Any]]:
    """The manifest's ``ops``."""
    layers = range(job.config.num_hidden_layers)
    names = [SPARSE] + [LINEAR] * any(STATE in job.config.layer_caches(layer) for layer in layers)
    names += [EXPERTS] * isinstance(job.config, MiniCPMMoEConfig)
    return [{"name": f"{DOMAIN}.{name}", "version": VERSION, "how": INLINED} for name in names]


STOCK = EngineForm(_weights, {"MatMul": HalfOp(2), SPARSE: HalfOp(3)}, _place_attention, rows_out=True)
