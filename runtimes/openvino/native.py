"""OpenVINO's native graph: our kernels over packed weights, opened for sessions (see ``native_session``).

Prefill runs the compiled graph. A decode step reads the same mapped weights as a program of the kernels (see
``program``), since OpenVINO's overhead of each node would be a tenth of a small model's step.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from cpm_edge.plugins.native import REBUILD, NativeError, best_isa, load_extension
from cpm_edge.plugins.sparse_attention.cache import CACHE_TYPES, KEY_GROUP, AttentionCache
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from cpm_edge.runtimes.bundle import Bundle, Manifest, check_engine
from cpm_edge.runtimes.cache_layout import recurrent_info
from cpm_edge.runtimes.errors import BackendError, BundleError, missing_dependency
from cpm_edge.runtimes.openvino.native_session import SPAWN, OpenVinoNativeSession
from cpm_edge.runtimes.openvino.program import DecodeStep
from cpm_edge.runtimes.session import Engine

if TYPE_CHECKING:
    import openvino as ov

MODEL = "openvino_native.xml"


def open_engine(
    bundle: Bundle, *, device: str, threads: int | None, max_context: int | None
) -> OpenVinoNativeEngine:
    """Compile the bundle's native model.

    Raises:
        BackendError: openvino or the extension is missing, or the device is not the CPU.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_dependency("openvino", "aipc") from error
    check_engine(bundle.manifest.engine["requires"], openvino.get_version().split("-")[0], name="openvino")
    if device.upper() != "CPU":
        raise BackendError(
            f"device: expected CPU for the native flavour, got {device}",
            hint="export with --flavour stock for other devices",
        )
    core = openvino.Core()
    try:
        load_extension(core)
    except NativeError as error:
        raise BackendError(str(error), hint=f"{REBUILD} Or export with --flavour stock.") from error
    try:
        model = core.read_model(bundle.file(MODEL))
        decode = DecodeStep(_static_decode(model.clone()))
        options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        prefill = core.compile_model(model, "CPU", options)
        rotary = decode.rotary and core.compile_model(decode.rotary, "CPU", options)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot open {MODEL}: {error}") from error
    threads = threads or os.cpu_count() or 1
    return OpenVinoNativeEngine(prefill, rotary, decode, bundle, threads, max_context)


def _static_decode(model: ov.Model) -> ov.Model:
    """The same graph for exactly one token."""
    import openvino.opset15 as ops

    first = next(p for p in model.get_parameters() if p.get_friendly_name() == "logits_from")
    zero = ops.constant(np.zeros(1, np.int64))
    for user in list(first.output(0).get_target_inputs()):
        user.replace_source_output(zero.output(0))
    model.remove_parameter(first)
    model.reshape({"input_ids": [1, 1], "past_length": [1]})
    return model


def _attention_spec(manifest: Manifest) -> SparseAttentionSpec:
    """What the caches depend on.

    Raises:
        BundleError: a cache that these kernels do not have.
    """
    layout = manifest.cache
    if layout["dtype"] not in CACHE_TYPES or layout.get("key_group", KEY_GROUP) != KEY_GROUP:
        raise BundleError(
            f"cache: expected float16, or int8 with a scale every {KEY_GROUP} columns, got {layout}",
            hint="Upgrade with: pip install --upgrade cpm-edge",
        )
    # Attributes that have their default are not in the manifest.
    names = {field.name for field in dataclasses.fields(SparseAttentionSpec)}
    return SparseAttentionSpec(**{name: value for name, value in manifest.attention.items() if name in names})


class OpenVinoNativeEngine(Engine):
    """The compiled models and the decode program; each session has its own requests, threads and caches."""

    def __init__(
        self,
        prefill: ov.CompiledModel,
        rotary: ov.CompiledModel | None,
        decode: DecodeStep,
        bundle: Bundle,
        threads: int,
        max_context: int | None,
    ) -> None:
        self.prefill, self.rotary, self.decode = prefill, rotary, decode
        self.manifest = bundle.manifest
        self.threads = threads
        self.max_context = max_context or bundle.manifest.context.max_context
        self.spec = _attention_spec(bundle.manifest)
        self._owner = os.getpid()

    def session(self) -> OpenVinoNativeSession:
        """A new, empty session.

        Raises:
            BackendError: this process is a fork of the one that opened the bundle.
        """
        if os.getpid() != self._owner:
            raise BackendError(
                f"the bundle was opened by process {self._owner}, of which this one is a fork: "
                "the engine's threads stayed there",
                hint=SPAWN,
            )
        return OpenVinoNativeSession(self)

    def empty_cache(self) -> AttentionCache:
        """The cache of one layer, without rows."""
        layout = self.manifest.cache
        return AttentionCache.empty(self.spec, 1, 0, layout["head_dim"], layout["dtype"])

    def info(self) -> dict[str, Any]:
        import openvino

        return {
            "engine": "openvino",
            "flavour": "native",
            "isa": best_isa().name.lower(),
            "version": openvino.get_version().split("-")[0],
            "device": "CPU",
            "threads": self.threads,
            "kv_cache": self.manifest.cache["dtype"],
            "max_context": self.max_context,
            **recurrent_info(self.manifest.cache),
        }
