"""Sessions on ONNX Runtime: caches are buffers that the graph reads and writes in place."""

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
    import onnxruntime as ort

MODEL = "model.onnx"
FIRST_CAPACITY = 1024
DENSE_COPIES = 1
PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}


def open_engine(
    bundle: Bundle, *, device: str, threads: int | None, max_context: int | None
) -> OnnxRuntimeEngine:
    """Load the bundle's model.

    Raises:
        BackendError: onnxruntime is missing or too old, or has no such device.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_dependency("onnxruntime", "ort") from error
    check_engine(bundle.manifest.engine["requires"], onnxruntime.__version__, name="onnxruntime")
    provider = PROVIDERS.get(device.upper())
    available = onnxruntime.get_available_providers()
    if provider is None:
        raise BackendError(
            f"device: expected CPU or cuda for an ort bundle, got {device}",
            hint="use --device CPU, or export with --target aipc for an Intel GPU",
        )
    if provider not in available:
        raise BackendError(
            f"device {device}: onnxruntime has no {provider} here (it has {', '.join(available)})",
            hint='pip install "cpm-edge[ort-gpu]" on a machine with a CUDA driver, or use --device CPU',
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        model = onnxruntime.InferenceSession(str(bundle.file(MODEL)), options, providers=[provider])
    except Exception as error:
        raise BackendError(f"onnxruntime cannot load {MODEL}: {error}") from error
    if provider not in model.get_providers():
        raise BackendError(
            f"device {device}: onnxruntime fell back to {', '.join(model.get_providers())}",
            hint="check the CUDA and cuDNN versions that onnxruntime-gpu needs, or use --device CPU",
        )
    return OnnxRuntimeEngine(model, bundle, device.upper(), threads, max_context)


class OnnxRuntimeEngine(Engine):
    """A loaded model; sessions share its weights and keep their own cache buffers."""

    def __init__(
        self,
        model: ort.InferenceSession,
        bundle: Bundle,
        device: str,
        threads: int | None,
        max_context: int | None,
    ) -> None:
        self.model = model
        self.manifest = bundle.manifest
        self.device = device
        self.threads = threads
        self.max_context = max_context or bundle.manifest.context.max_context

    def session(self) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self)

    def info(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "device": self.device,
            "threads": self.threads,
            "max_context": self.max_context,
            **recurrent_info(self.manifest.cache),
        }


class OnnxRuntimeSession(Session):
    """One sequence. The cache buffers (1, kv heads, capacity, head_dim) double up to the context; those of
    recurrent layers keep their size."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        manifest = engine.manifest
        self._recurrent = RecurrentLayout.of(manifest.cache)
        super().__init__(
            max_context=engine.max_context,
            vocab_size=manifest.vocab_size,
            prefill_chunk=prefill_chunk(manifest.attention, score_copies(manifest.attention, DENSE_COPIES)),
            state_bytes=self._recurrent.nbytes if self._recurrent else 0,
        )
        self._engine = engine
        self._layout = manifest.cache
        names = [f"{layer}.{port}" for layer in kv_layers(self._layout) for port in kv_ports(self._layout)]
        self._buffers: dict[str, ort.OrtValue] = {}
        self._states: dict[str, ort.OrtValue] = {}
        if self._recurrent:
            self._load_states(None)
        self._allocate(names, self._rounded(min(FIRST_CAPACITY, self.max_context)))

    def cache_bytes(self) -> int:
        held = (*self._buffers.values(), *self._states.values())
        return int(sum(math.prod(b.shape()) * 4 for b in held)) + self.snapshot_bytes()

    def layer_keys(self, layer: int) -> FloatArray:
        rows: FloatArray = self._buffers[f"{layer}.key"].numpy()[0, :, : self._cached]
        return rows

    def layer_state(self, layer: int) -> FloatArray:
        state: FloatArray = self._states[f"{layer}.{STATE}"].numpy()[0]
        return state

    def _rounded(self, rows: int) -> int:
        multiple = int(self._layout["multiple_of"])
        return -(-rows // multiple) * multiple

    @property
    def _capacity(self) -> int:
        return int(next(iter(self._buffers.values())).shape()[2])

    def _allocate(self, names: list[str], capacity: int) -> None:
        shape = (1, self._layout["kv_heads"], capacity, self._layout["head_dim"])
        for name in names:
            rows = np.zeros(shape, np.float32)
            if name in self._buffers and self._cached:
                rows[:, :, : self._cached] = self._buffers[name].numpy()[:, :, : self._cached]
            self._buffers[name] = self._on_device(rows)

    def _on_device(self, array: np.ndarray) -> ort.OrtValue:
        """On the CPU it is the array's own memory."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._engine.device.lower(), 0)

    def _reserve(self, rows: int) -> None:
        if rows <= self._capacity:
            return
        wanted = min(max(2 * self._capacity, rows), self._rounded(self.max_context))
        self._allocate(list(self._buffers), self._rounded(wanted))

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        self._reserve(self._cached + len(tokens))
        model, binding = self._engine.model, self._engine.model.io_binding()
        binding.bind_cpu_input("input_ids", tokens[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, self._cached + len(tokens)), np.int64))
        first = 0 if logits == "all" else len(tokens) - 1
        binding.bind_ortvalue_input("logits_from", _cpu_value(np.array([first], np.int64)))
        binding.bind_output("logits", "cpu")
        for name, buffer in (*self._buffers.items(), *self._states.items()):
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        try:
            model.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"onnxruntime failed at position {self._cached}: {error}") from error
        rows: FloatArray = binding.get_outputs()[0].numpy()[0]
        return rows

    def _truncate(self, position: int) -> None:
        """Rows past the position are overwritten before they are read."""

    def _save_states(self) -> States:
        return [state.numpy().copy() for state in self._states.values()]

    def _load_states(self, states: States | None) -> None:
        assert self._recurrent is not None
        for index, layer in enumerate(self._recurrent.layers):
            state = np.zeros(self._recurrent.shape, np.float32) if states is None else states[index].copy()
            self._states[f"{layer}.{STATE}"] = self._on_device(state)

    def _clone(self) -> OnnxRuntimeSession:
        twin = OnnxRuntimeSession(self._engine)
        for mine, theirs in ((self._buffers, twin._buffers), (self._states, twin._states)):
            theirs.update({name: self._on_device(buffer.numpy().copy()) for name, buffer in mine.items()})
        return twin

    def _close(self) -> None:
        self._buffers.clear()
        self._states.clear()


def _cpu_value(array: np.ndarray) -> ort.OrtValue:
    # bind_cpu_input knows only the inputs without a default.
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
