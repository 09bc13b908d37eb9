"""ONNX Runtime: model.onnx with external data, and genai_config.json for onnxruntime-genai."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.context_inputs import past_from_attention_mask
from cpm_edge.exporter.passes.experts import find_experts, inline_experts
from cpm_edge.exporter.passes.gated_linear import lower_linear_attention
from cpm_edge.exporter.passes.grouped_query import lower_dense_attention
from cpm_edge.exporter.passes.qmoe import QMoEWeights, takes_experts
from cpm_edge.exporter.targets.common import BuildJob, Built, cache_layers
from cpm_edge.exporter.weight_file import WeightFile
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.mixture_of_experts.spec import OP as EXPERTS
from cpm_edge.plugins.sparse_attention.body import functions
from cpm_edge.plugins.sparse_attention.latent_body import latent_functions
from cpm_edge.plugins.sparse_attention.spec import OP as SPARSE
from cpm_edge.quant import WeightFormat
from cpm_edge.runtimes.errors import missing_dependency

MODEL = "model.onnx"
DATA = "model.onnx.data"
REQUIRES = ">=1.24"
# Older ones have no kernel for bits 2 and expand the weights for every token. Linear attention and QMoE were
# not run on them.
REQUIRES_NEW = ">=1.32"
ACCURACY_LEVEL = {"fp32": 0, "int8": 4}


def build(job: BuildJob) -> Built:
    """Write the model into ``job.folder``.

    Raises:
        ExportError: an option that ONNX Runtime's CPU kernels do not offer, or a disk error.
        BackendError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_dependency("onnxruntime", "ort") from error
    if job.kv_cache not in (None, "fp32"):
        raise ExportError(
            f"--kv-cache: expected fp32 for target ort, got {job.kv_cache}",
            hint="ONNX Runtime's CPU attention keeps the cache in the activations' type; use --target aipc",
        )
    # Without int8 activations ONNX Runtime's CPU kernel expands the weights anew for every token.
    linear = job.weights.policy.linear
    activations = job.activations or ("fp32" if linear.format.is_float else "int8")
    genai = genai_config(job)
    graph = job.model.graph
    total, _ = past_from_attention_mask(graph)
    spec = job.config.attention_spec(0)
    is_grouped = lower_dense_attention(graph, total) > 0
    is_hybrid = lower_linear_attention(graph) > 0
    _default_logits_from(graph)
    level = ACCURACY_LEVEL[activations]
    experts = find_experts(graph)
    packed = experts if all(takes_experts(job.weights, each, level) for each in experts) else []
    if not packed:
        inline_experts(job.model)
    with WeightFile(job.folder / DATA) as file:
        QMoEWeights(graph, job.weights, file, level, job.progress, packed).run()
    if not is_grouped:
        bodies = latent_functions if spec.is_latent else functions
        for function in bodies(opset=graph.opset_imports[""]):
            job.model.functions[function.identifier()] = function
    ir.save(job.model, job.folder / MODEL)
    if is_grouped and not is_hybrid:  # onnxruntime-genai's "llama" has no states
        (job.folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n")
    return Built(
        engine={
            "name": "onnxruntime",
            "version": onnxruntime.__version__,
            "requires": REQUIRES_NEW
            if is_hybrid or packed or linear.format is WeightFormat.TERNARY
            else REQUIRES,
        },
        cache={
            "form": "buffer",
            **cache_layers(job.config, "float32"),
            "multiple_of": 1 if spec.is_dense else spec.block_size,
        },
        activations=activations,
        ops=_ops(is_grouped, is_hybrid, has_experts=bool(experts), packed=bool(packed)),
    )


def _ops(is_grouped: bool, is_hybrid: bool, *, has_experts: bool, packed: bool) -> list[dict[str, Any]]:
    how = {} if is_grouped else {SPARSE: "function body in the model"}
    if is_hybrid:
        how[LINEAR] = "com.microsoft.LinearAttention"
    if has_experts:
        how[EXPERTS] = "com.microsoft.QMoE" if packed else "inlined function body"
    return [{"name": f"{DOMAIN}.{name}", "version": VERSION, "how": text} for name, text in how.items()]


def _default_logits_from(graph: ir.Graph) -> None:
    """Give the input ``logits_from`` the default 0, so that only runtimes that know it need to feed it."""
    value = next(value for value in graph.inputs if value.name == "logits_from")
    value.const_value = ir.tensor(np.zeros(1, np.int64), name="logits_from")
    graph.register_initializer(value)


def genai_config(job: BuildJob) -> dict[str, Any]:
    """onnxruntime-genai's description of the model; it takes no key that it does not know.

    Raises:
        ConfigError: a token id or a sampling default of the wrong type.
    """
    config = job.config
    source = ConfigReader({**job.checkpoint.config, **job.checkpoint.generation_config}, "generation_config")
    eos = source.token_ids("eos_token_id") or [2]
    pad = source.token_ids("pad_token_id") or eos
    bos = source.token_ids("bos_token_id") or [1]
    return {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": job.max_context,
            "bos_token_id": bos[0],
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": pad[0],
            "decoder": {
                "filename": MODEL,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": source.get("do_sample", bool, False),
            "max_length": job.max_context,
            "past_present_share_buffer": True,
            "temperature": source.get("temperature", float, 1.0),
            "top_k": source.get("top_k", int, 50),
            "top_p": source.get("top_p", float, 1.0),
            "repetition_penalty": source.get("repetition_penalty", float, 1.0),
        },
    }
