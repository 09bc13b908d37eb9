"""An engine's graph run by ONNX Runtime on the CPU, to verify what goes to a device that is not here.

Plugin nodes become functions of standard operators, their plans set aside. Caches are as the manifest says:
``in_place`` buffers that the graph updates, or ``rows_out``, whose new rows are copied into the buffers. A
verification, no runtime: float16 is slow on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.linear_attention.body import functions as linear_functions
from cpm_edge.plugins.matmul_nbits import body as matmul_body
from cpm_edge.plugins.sparse_attention import in_place_body
from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.cache_layout import STATE, RecurrentLayout
from cpm_edge.runtimes.embedding import HostEmbedding
from cpm_edge.runtimes.session import Engine, FloatArray, Logits, Session, TokenArray
from cpm_edge.runtimes.snapshots import States

MODEL = "model.onnx"
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
PLUGIN_ATTRIBUTES = ("plugin_version", "plugin_namespace", "plan")
ASYMMETRIC_INPUTS = 4  # of CpmMatMulNBits
PAST = "past_key_values."
_NUMPY: dict[str, Any] = {"tensor(float16)": np.float16, "tensor(float)": np.float32}


def portable(model: ir.Model) -> ir.Model:
    """The model with every plugin node as a call of the function that specifies it; changed in place."""
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for node in nodes:
        for name in PLUGIN_ATTRIBUTES:
            node.attributes.pop(name, None)
        if node.op_type == matmul_body.NAME and len(node.inputs) == ASYMMETRIC_INPUTS - 1:
            zero = matmul_body.only_zero(node.attributes.get_int("bits"))
            if zero.name not in model.graph.initializers:
                model.graph.register_initializer(zero)
            node.resize_inputs(ASYMMETRIC_INPUTS)
            node.replace_input_with(ASYMMETRIC_INPUTS - 1, model.graph.initializers[zero.name or ""])
    for function in _functions(nodes):
        model.functions[function.identifier()] = function
    return model


def _functions(nodes: list[ir.Node]) -> list[ir.Function]:
    """Those that the nodes call."""
    if not nodes:
        return []
    attention = [node for node in nodes if node.op_type == in_place_body.NAME]
    dense = all(not node.attributes.get_int("topk") for node in attention)
    found = matmul_body.functions() + linear_functions(plugin=True)
    return found + in_place_body.in_place_functions(dense=dense)


class GraphEngine(Engine):
    """A bundle of form ``in_place`` or ``rows_out``.

    Args:
        bundle: its manifest need not be written yet.
    """

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        self.manifest = bundle.manifest
        self.max_context = bundle.manifest.context.max_context
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(EXTERNAL_FOLDER, str(bundle.path.resolve()))
        # Folding constants would expand all weights in memory.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = ir.serde.serialize_model(portable(ir.load(bundle.file(MODEL)))).SerializeToString()
        self.model = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.embedding = HostEmbedding(bundle) if bundle.manifest.engine["embedding"] else None

    def session(self) -> GraphSession:
        return GraphSession(self)

    def info(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "device": "CPU",
            "threads": None,
            "max_context": self.max_context,
        }


class GraphSession(Session):
    """One sequence; every buffer has the engine's capacity."""

    def __init__(self, engine: GraphEngine) -> None:
        manifest = engine.manifest
        recurrent = RecurrentLayout.of(manifest.cache)
        super().__init__(
            max_context=engine.max_context,
            vocab_size=manifest.vocab_size,
            prefill_chunk=lambda _: int(manifest.engine["prefill_chunk"]),
            state_bytes=recurrent.nbytes if recurrent else 0,
        )
        self._engine = engine
        self._caches: dict[str, npt.NDArray[Any]] = {
            value.name: np.zeros(value.shape, _NUMPY[value.type])
            for value in engine.model.get_inputs()
            if value.name.startswith(PAST)
        }

    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values()) + self.snapshot_bytes()

    def layer_keys(self, layer: int) -> FloatArray:
        return self._caches[f"{PAST}{layer}.key"][0, :, : self._cached].astype(np.float32)

    def layer_state(self, layer: int) -> FloatArray:
        state: FloatArray = self._caches[f"{PAST}{layer}.{STATE}"][0]
        return state

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        engine, count = self._engine, len(tokens)
        rows = np.arange(0 if logits == "all" else count - 1, count, dtype=np.int32)
        feeds: dict[str, npt.NDArray[Any]] = {
            "past_length": np.array([self._cached], np.int32),
            "logit_rows": rows,
            **self._caches,
        }
        if engine.embedding is None:
            feeds["input_ids"] = tokens.astype(np.int32)[None]
        else:
            embeds = np.empty((1, count, engine.manifest.hidden_size), np.float16)
            engine.embedding.gather(tokens, embeds[0])
            feeds["inputs_embeds"] = embeds
        names = [value.name for value in engine.model.get_outputs()]
        results = dict(zip(names, engine.model.run(names, feeds), strict=True))
        found: FloatArray = results.pop("logits")[0]
        for name, value in results.items():
            kind, _, port = name.partition(".")
            if kind == "new":
                self._caches[PAST + port][:, :, self._cached : self._cached + count] = value
            else:
                self._caches[PAST + port] = value
        return found

    def _truncate(self, position: int) -> None:
        """Rows past the position are overwritten before they are read."""

    def _save_states(self) -> States:
        return [cache.copy() for name, cache in self._caches.items() if name.endswith(STATE)]

    def _load_states(self, states: States | None) -> None:
        names = [name for name in self._caches if name.endswith(STATE)]
        for index, name in enumerate(names):
            self._caches[name] = np.zeros_like(self._caches[name]) if states is None else states[index].copy()

    def _clone(self) -> GraphSession:
        twin = GraphSession(self._engine)
        twin._caches = {name: cache.copy() for name, cache in self._caches.items()}
        return twin

    def _close(self) -> None:
        self._caches.clear()
