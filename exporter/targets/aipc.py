"""OpenVINO IR in one of two flavours.

``stock`` is a stateful model of standard operators that LLMPipeline opens unchanged; ``native`` (aipc_native)
runs our kernels.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from cpm_edge.exporter.disk import openvino_disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.context_inputs import past_from_attention_mask
from cpm_edge.exporter.passes.experts import find_experts
from cpm_edge.exporter.passes.openvino_attention import dense_attention
from cpm_edge.exporter.passes.openvino_constants import attach_constants
from cpm_edge.exporter.passes.openvino_experts import stack_experts, tiled_experts
from cpm_edge.exporter.passes.openvino_names import renumber
from cpm_edge.exporter.passes.openvino_state import make_stateful, stable_topk
from cpm_edge.exporter.passes.openvino_weights import OpenVinoWeights
from cpm_edge.exporter.targets.aipc_native import CACHE_TYPES, OPS, build_native
from cpm_edge.exporter.targets.common import BuildJob, Built, cache_layers
from cpm_edge.exporter.targets.openvino_tokenizer import DETOKENIZER, TOKENIZER, write_tokenizer
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.linear_attention.body import functions as linear_functions
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.mixture_of_experts.spec import OP as EXPERTS
from cpm_edge.plugins.sparse_attention.body import functions
from cpm_edge.plugins.sparse_attention.latent_body import latent_functions
from cpm_edge.plugins.sparse_attention.spec import OP, SparseAttentionSpec
from cpm_edge.runtimes.errors import missing_dependency

MODEL = "openvino_model.xml"
DATA = "openvino_model.bin"
INLINED = "inlined function body"
KV_PRECISION = {"fp32": "f32", "fp16": "f16", "int8": "u8"}


def build(job: BuildJob) -> Built:
    """Write the model and the tokenizer into ``job.folder``.

    Raises:
        ExportError: the graph could not be converted, or a disk error.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise missing_dependency("openvino", "aipc") from error
    if job.flavour == "native":
        return _native(job)
    spec = job.config.attention_spec(0)
    kv_cache = _kv_cache(job, spec)
    activations = job.activations or "fp32"
    stacks = stack_experts(job.model.graph, find_experts(job.model.graph))
    model = _read(job.model, spec)
    weights = OpenVinoWeights(model, job.weights, stacks)
    weights.replace_parameters()
    stable_topk(model)
    make_stateful(model)
    _runtime_options(model, kv_cache, activations)
    with openvino_disk_errors(job.folder / MODEL):
        ov.serialize(model, str(job.folder / MODEL), str(job.folder / DATA))
    del model
    attach_constants(job.folder / MODEL, job.folder / DATA, weights, job.progress)
    write_tokenizer(job.folder)
    for name in (MODEL, TOKENIZER, DETOKENIZER):
        renumber(job.folder / name)
    dtype = {"fp32": "float32", "fp16": "float16", "int8": "uint8"}[kv_cache]
    layers = cache_layers(job.config, dtype)
    how = {OP: "SDPA" if _is_fused(spec) else INLINED}
    if "recurrent" in layers:
        how[LINEAR] = INLINED
    if stacks:
        how[EXPERTS] = "products that the plugins make GatherMatmul of"
    return Built(
        engine=_engine(),
        cache={
            "form": "state",
            **layers,
        },
        activations=activations,
        ops=[{"name": f"{DOMAIN}.{name}", "version": VERSION, "how": text} for name, text in how.items()],
        flavour="stock",
    )


def _is_fused(spec: SparseAttentionSpec) -> bool:
    """Whether the CPU plugin has one operator for this attention and its cache."""
    return spec.is_dense and not spec.is_latent


def _kv_cache(job: BuildJob, spec: SparseAttentionSpec) -> str:
    """The cache's format: what was asked for, or the usual one.

    Raises:
        ExportError: the CPU plugin does not keep this model's cache in it.
    """
    if spec.is_latent:
        # The plugin narrows only the states of its own attention operator; all others are float32.
        if job.kv_cache not in (None, "fp32"):
            raise ExportError(
                f"--kv-cache: expected fp32 for latent attention in the stock flavour, got {job.kv_cache}",
                hint="leave --kv-cache out",
            )
        return "fp32"
    if not spec.is_dense and job.kv_cache == "int8":
        raise ExportError(
            "--kv-cache: expected fp32 or fp16 for sparse attention in the stock flavour, got int8",
            hint="leave --kv-cache out, use --flavour native, or export with --attention dense",
        )
    return job.kv_cache or ("fp32" if job.weights.policy.linear.format.value == "fp32" else "fp16")


def _native(job: BuildJob) -> Built:
    latent = job.config.attention_spec(0).is_latent
    for option, value, choices in (
        ("--kv-cache", job.kv_cache, ("fp16",) if latent else tuple(CACHE_TYPES)),
        ("--activations", job.activations, ("int8",)),
    ):
        if value is not None and value not in choices:
            raise ExportError(
                f"{option}: expected {' or '.join(choices)} in the native flavour, got {value}",
                hint=f"leave {option} out, or use --flavour stock",
            )
    cache = build_native(job)
    return Built(
        engine=_engine(exact=True),
        cache=cache,
        activations="int8",
        ops=[{"name": f"{DOMAIN}.{name}", "version": VERSION, "how": "OpenVINO extension"} for name in OPS],
        flavour="native",
    )


def _engine(*, exact: bool = False) -> dict[str, str]:
    version = importlib.metadata.version("openvino")
    release = ".".join(version.split(".")[:2])
    return {"name": "openvino", "version": version, "requires": f"=={version}" if exact else f">={release}"}


def _read(model: ir.Model, spec: SparseAttentionSpec) -> Any:
    """The traced graph as an OpenVINO model whose weights are parameters."""
    import openvino as ov
    from openvino.frontend.onnx import ConversionExtension

    graph = model.graph
    past_from_attention_mask(graph)
    _fix_logits_from(graph)
    for name, value in list(graph.initializers.items()):
        if value.const_value is None:
            del graph.initializers[name]
            graph.inputs.append(value)
    core = ov.Core()
    core.add_extension(ConversionExtension(EXPERTS, DOMAIN, tiled_experts()))
    opset = graph.opset_imports[""]
    bodies = linear_functions(opset=opset) if any(node.op_type == LINEAR for node in graph) else []
    if _is_fused(spec):
        core.add_extension(ConversionExtension(OP, DOMAIN, dense_attention()))
    else:
        bodies += (latent_functions if spec.is_latent else functions)(grow=True, opset=opset)
    for function in bodies:
        model.functions[function.identifier()] = function
    InlinePass()(model)
    model.functions.clear()
    return core.read_model(ir.serde.serialize_model(model).SerializeToString())


def _fix_logits_from(graph: ir.Graph) -> None:
    """Other runtimes do not feed ``logits_from``: a constant here, which our runtime makes an input again."""
    value = next(value for value in graph.inputs if value.name == "logits_from")
    graph.inputs.remove(value)
    value.const_value = ir.tensor([0], dtype=ir.DataType.INT64, name="logits_from")
    graph.register_initializer(value)


def _runtime_options(model: Any, kv_cache: str, activations: str) -> None:
    """Precision choices travel with the model instead of being the engine's defaults."""
    options = {
        "KV_CACHE_PRECISION": KV_PRECISION[kv_cache],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32" if activations == "int8" else "0",
    }
    for key, value in options.items():
        model.set_rt_info(value, ["runtime_options", key])
