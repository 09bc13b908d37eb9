"""OpenVINO IR, flavour ``native``: cpm ops over packed weights, for our extension on the CPU."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from cpm_edge.exporter.disk import openvino_disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.column_order import gather_before_norms
from cpm_edge.exporter.passes.native_ops import NativeFusion
from cpm_edge.exporter.passes.native_weights import NativeWeights
from cpm_edge.exporter.passes.openvino_constants import attach_constants
from cpm_edge.exporter.passes.openvino_names import renumber
from cpm_edge.exporter.targets.common import BuildJob, cache_layers
from cpm_edge.plugins.native import REBUILD, NativeError, load_extension
from cpm_edge.plugins.sparse_attention.cache import KEY_GROUP

MODEL = "openvino_native.xml"
DATA = "openvino_native.bin"
# Values of --kv-cache, as the manifest names them.
CACHE_TYPES = {"fp16": "float16", "int8": "int8"}
OPS = (
    "NormLinear",
    "NormGated",
    "NormSparseMlp",
    "NormExperts",
    "LinearAdd",
    "CachedAttention",
    "RecurrentAttention",
    "LatentAttention",
)


def build_native(job: BuildJob) -> dict[str, Any]:
    """Write the native model into ``job.folder``.

    Returns:
        The manifest's description of its cache.

    Raises:
        ExportError: the extension is not here, a format that the kernels do not take, or a disk error.
    """
    import openvino as ov

    gather_before_norms(job.model.graph)
    plan = NativeFusion(job.model.graph, job.weights).run()
    for name, value in list(job.model.graph.initializers.items()):
        if value.const_value is None:
            del job.model.graph.initializers[name]
            if value.uses():
                job.model.graph.inputs.append(value)
    core = ov.Core()
    try:
        load_extension(core)
    except NativeError as error:
        raise ExportError(f"--flavour native: {error}", hint=f"{REBUILD} Or use --flavour stock.") from error
    model = core.read_model(ir.serde.serialize_model(job.model).SerializeToString())
    weights = NativeWeights(model, job.weights, plan)
    weights.replace_parameters()
    with openvino_disk_errors(job.folder / MODEL):
        ov.serialize(model, str(job.folder / MODEL), str(job.folder / DATA))
    del model
    attach_constants(job.folder / MODEL, job.folder / DATA, weights, job.progress)
    renumber(job.folder / MODEL)
    spec = job.config.attention_spec(0)
    dtype = CACHE_TYPES[job.kv_cache or "fp16"]
    return {
        "form": "session",
        **({"key_group": KEY_GROUP} if dtype == "int8" else {}),
        **cache_layers(job.config, dtype),
        "multiple_of": spec.block_size,
        "pooled_stride": 0 if spec.is_dense else spec.kernel_stride,
    }
