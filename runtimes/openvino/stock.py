"""Sessions on OpenVINO's stock graph: the caches are the infer request's state and grow by themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cpm_edge.runtimes.bundle import Bundle, check_engine
from cpm_edge.runtimes.cache_layout import STATE, RecurrentLayout, kv_layers, kv_ports, recurrent_info
from cpm_edge.runtimes.errors import BackendError, missing_dependency
from cpm_edge.runtimes.session import Engine, FloatArray, Logits, Session, TokenArray
from cpm_edge.runtimes.snapshots import States
from cpm_edge.runtimes.workspace import prefill_chunk, score_copies

if TYPE_CHECKING:
    import openvino as ov

MODEL = "openvino_model.xml"
DEVICES = ("CPU", "GPU")


def open_engine(
    bundle: Bundle, *, device: str, threads: int | None, max_context: int | None
) -> OpenVinoEngine:
    """Compile the bundle's model.

    Raises:
        BackendError: openvino is missing or too old, or has no such device.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_dependency("openvino", "aipc") from error
    version = openvino.get_version().split("-")[0]
    check_engine(bundle.manifest.engine["requires"], version, name="openvino")
    device = device.upper()
    if device not in DEVICES:
        hint = "use --device CPU or GPU"
        if device == "NPU":
            hint = "openvino_genai.LLMPipeline opens the bundle for the NPU; here use --device CPU or GPU"
        raise BackendError(
            f"device: expected {' or '.join(DEVICES)} for an aipc bundle, got {device}", hint=hint
        )
    core = openvino.Core()
    present = {name.split(".")[0] for name in core.available_devices}
    if device not in present:
        raise BackendError(
            f"device {device}: OpenVINO finds {', '.join(sorted(present))} on this machine",
            hint="install the Intel GPU driver, or use --device CPU" if device == "GPU" else None,
        )
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    if RecurrentLayout.of(bundle.manifest.cache):
        # Engines that would compute in 16 bits by themselves would keep the states in them.
        options["INFERENCE_PRECISION_HINT"] = "f32"
    try:
        model = core.read_model(bundle.file(MODEL))
        _logits_from_input(model)
        compiled = core.compile_model(model, device, options)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot compile {MODEL} for {device}: {error}") from error
    return OpenVinoEngine(compiled, bundle, device, threads, max_context)


def _logits_from_input(model: ov.Model) -> None:
    """Make the constant ``logits_from`` an input, so that prefill computes only the logits it needs."""
    import openvino.opset15 as ops
    from openvino import PartialShape, Type

    slices = [node for node in model.get_ops() if node.get_friendly_name() == "logits_rows"]
    if len(slices) != 1:
        raise BackendError(f"{MODEL}: expected one node logits_rows, found {len(slices)}")
    start = ops.parameter(PartialShape([1]), Type.i64, name="logits_from")
    start.output(0).set_names({"logits_from"})
    slices[0].input(1).replace_source_output(start.output(0))
    model.add_parameters([start])
    model.validate_nodes_and_infer_types()


class OpenVinoEngine(Engine):
    """A compiled model; each session has an infer request with its own state."""

    def __init__(
        self,
        compiled: ov.CompiledModel,
        bundle: Bundle,
        device: str,
        threads: int | None,
        max_context: int | None,
    ) -> None:
        self.compiled = compiled
        self.manifest = bundle.manifest
        self.device = device
        self.threads = threads
        self.max_context = max_context or bundle.manifest.context.max_context

    def session(self) -> OpenVinoSession:
        return OpenVinoSession(self)

    def info(self) -> dict[str, Any]:
        import openvino

        return {
            "engine": "openvino",
            "version": openvino.get_version().split("-")[0],
            "device": self.device,
            "threads": self.threads,
            "max_context": self.max_context,
            **recurrent_info(self.manifest.cache),
        }


class OpenVinoSession(Session):
    """One sequence: the state variables of one infer request, (1, kv heads, position, head_dim) for keys and
    values, (1, heads, D, D) for recurrent layers."""

    def __init__(self, engine: OpenVinoEngine) -> None:
        manifest = engine.manifest
        self._recurrent = RecurrentLayout.of(manifest.cache)
        super().__init__(
            max_context=engine.max_context,
            vocab_size=manifest.vocab_size,
            prefill_chunk=prefill_chunk(manifest.attention, score_copies(manifest.attention, 0)),
            state_bytes=self._recurrent.nbytes if self._recurrent else 0,
        )
        self._engine = engine
        self._layout = manifest.cache
        self._request = engine.compiled.create_infer_request()
        self._beam = np.zeros(1, np.int32)

    def cache_bytes(self) -> int:
        item = np.dtype(self._layout["dtype"]).itemsize
        layers, ports = len(kv_layers(self._layout)), len(kv_ports(self._layout))
        row = layers * ports * self._layout["kv_heads"] * self._layout["head_dim"]
        states = self._recurrent.nbytes if self._recurrent else 0
        return int(math.prod((row, self._cached, item))) + states + self.snapshot_bytes()

    def layer_keys(self, layer: int) -> FloatArray:
        return np.array(self._variable(layer, "key").state.data[0], np.float32)

    def layer_state(self, layer: int) -> FloatArray:
        return np.array(self._variable(layer, STATE).state.data[0], np.float32)

    def _variable(self, layer: int, port: str) -> ov.VariableState:
        name = f"past_key_values.{layer}.{port}"
        return next(s for s in self._request.query_state() if s.name.startswith(name))

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        first = 0 if logits == "all" else len(tokens) - 1
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, self._cached + len(tokens)), np.int64),
            "beam_idx": self._beam,
            "logits_from": np.array([first], np.int64),
        }
        try:
            self._request.infer(inputs, share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed at position {self._cached}: {error}") from error
        rows: FloatArray = self._request.get_tensor("logits").data[0]
        return rows if logits == "all" else rows.copy()

    def _truncate(self, position: int) -> None:
        import openvino

        if position == 0:
            self._request.reset_state()
            return
        for state in self._request.query_state():
            rows = state.state.data
            if STATE not in state.name and rows.shape[2] > position:
                state.state = openvino.Tensor(np.ascontiguousarray(rows[:, :, :position]))

    def _save_states(self) -> States:
        assert self._recurrent is not None
        return [self._variable(layer, STATE).state.data.copy() for layer in self._recurrent.layers]

    def _load_states(self, states: States | None) -> None:
        import openvino

        assert self._recurrent is not None
        for index, layer in enumerate(self._recurrent.layers):
            state = np.zeros(self._recurrent.shape, np.float32) if states is None else states[index]
            self._variable(layer, STATE).state = openvino.Tensor(state)

    def _clone(self) -> OpenVinoSession:
        import openvino

        twin = OpenVinoSession(self._engine)
        if self._cached:
            sources = {state.name: state for state in self._request.query_state()}
            for state in twin._request.query_state():
                state.state = openvino.Tensor(sources[state.name].state.data.copy())
        return twin

    def _close(self) -> None:
        del self._request
