"""Jetson, flavour ``native``: plugin nodes, the plugins' library and kernels compiled for the chip."""

from __future__ import annotations

import shutil

import onnx_ir as ir

from cpm_edge.exporter.cubins.compile import compile_cubins
from cpm_edge.exporter.disk import disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.packages import JETSON_MACHINE
from cpm_edge.exporter.passes.engine_weights import EngineWeights
from cpm_edge.exporter.passes.float16 import HalfOp
from cpm_edge.exporter.passes.plugin_attention import check_attention, place_plugins
from cpm_edge.exporter.passes.plugin_weights import STOCK, PluginWeights
from cpm_edge.exporter.targets.common import BuildJob, Built
from cpm_edge.exporter.targets.engine_graph import EngineForm, capacity_of, write_graph
from cpm_edge.exporter.targets.engine_manifest import (
    activation_bytes,
    cache_of,
    engine_of,
    longest_chunk,
    memory_of,
)
from cpm_edge.exporter.targets.engine_options import find_chip
from cpm_edge.exporter.weight_file import WeightFile
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.launch_plan import LaunchPlan, distinct
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.matmul_nbits.body import NAME as MATMUL
from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.sparse_attention.spec import OP as SPARSE
from cpm_edge.plugins.tensorrt_library import PLUGIN_VERSION, library

FOLDER = "plugins"
LIBRARY = f"{FOLDER}/libcpm_tensorrt.so"
KERNELS = f"{FOLDER}/kernels"


def build_native(job: BuildJob) -> Built:
    """Write graph, library and kernels into ``job.folder``.

    Raises:
        ExportError: a format or size that the kernels do not take, no plugin library, a kernel that does not
            compile, memory that the chip lacks, or a disk error.
    """
    assert job.chip is not None
    sm = find_chip(job.chip, job.target).sm
    assert sm is not None
    check_attention(job.config.attention_spec(0), job.config.head_dim, capacity_of(job))
    _copy_library(job)
    plans: list[LaunchPlan] = []
    table = write_graph(job, _form(plans))
    _compile(job, sm, plans)
    chunk, spec = longest_chunk(job), job.config.attention_spec(0)
    stride = 0 if spec.is_dense else spec.kernel_stride
    workspace = max(plan.workspace_bytes(chunk) for plan in plans) + activation_bytes(job, chunk)
    names = sorted({node.op_type for node in job.model.graph if node.domain == DOMAIN})
    plugins = {
        "library": LIBRARY,
        "kernels": f"{KERNELS}/index.json",
        "version": PLUGIN_VERSION,
        "names": names,
    }
    return Built(
        engine_of(sm, chunk, table, memory_of(job, workspace, stride), plugins),
        cache_of(job, "in_place", stride),
        "fp16",
        [{"name": f"{DOMAIN}.{name}", "version": VERSION, "how": "TensorRT plugin"} for name in names],
        flavour="native",
    )


def _form(plans: list[LaunchPlan]) -> EngineForm:
    def weights(graph: ir.Graph, job: BuildJob, file: WeightFile) -> EngineWeights:
        return PluginWeights(graph, job.weights, file, job.progress, plans)

    def place(model: ir.Model, job: BuildJob) -> None:
        place_plugins(model.graph, job.config.attention_spec(0), plans)

    half = {"MatMul": HalfOp(2), MATMUL: HalfOp(1), SPARSE: HalfOp(3), LINEAR: HalfOp(3, outputs=False)}
    return EngineForm(weights, half, place, rows_out=False)


def _copy_library(job: BuildJob) -> None:
    """Before anything that takes long: it may not have been built."""
    try:
        source = library(JETSON_MACHINE)
    except NativeError as error:
        raise ExportError(f"--flavour native: {error}", hint=STOCK) from error
    with disk_errors(job.folder / LIBRARY):
        (job.folder / KERNELS).mkdir(parents=True)
        shutil.copyfile(source, job.folder / LIBRARY)


def _compile(job: BuildJob, sm: int, plans: list[LaunchPlan]) -> None:
    """Only the kernels that the plans name."""
    compile_cubins(job.folder / KERNELS, sm, distinct(plans))
