"""Bundles for Jetson (TensorRT) and for PCs with an NVIDIA GPU (TensorRT-RTX), opened and run."""

from __future__ import annotations

import weakref
from typing import Any

from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.cache_layout import recurrent_info
from cpm_edge.runtimes.cuda_runtime import Stream
from cpm_edge.runtimes.embedding import HostEmbedding
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.session import Engine
from cpm_edge.runtimes.tensorrt.acquire import (
    DEVICE,
    REBUILD,
    Machine,
    deserialize,
    find_or_build,
    load_plugins,
)
from cpm_edge.runtimes.tensorrt.api import PluginLibrary
from cpm_edge.runtimes.tensorrt.cache import CachedEngine, EngineCache
from cpm_edge.runtimes.tensorrt.caches import DeviceCaches
from cpm_edge.runtimes.tensorrt.contexts import Contexts
from cpm_edge.runtimes.tensorrt.io import EngineIo
from cpm_edge.runtimes.tensorrt.memory import Need, Placement, check_run
from cpm_edge.runtimes.tensorrt.session import TensorRtSession
from cpm_edge.runtimes.tensorrt.step import Stepper
from cpm_edge.runtimes.tensorrt.weights import DeviceWeights


def open_engine(
    bundle: Bundle, *, device: str, threads: int | None, max_context: int | None
) -> TensorRtEngine:
    """Take the bundle's engine from the user's cache folder, or build it, and load it.

    Raises:
        BackendError: TensorRT or CUDA is missing or of another version, the device has another compute
            capability or too little memory, the plugins do not load, or the build fails.
        BundleError: the graph breaks its contract, or the engine's parser refuses it.
    """
    if threads is not None:
        raise BackendError(
            f"threads: {bundle.manifest.target} bundles compute on the GPU, expected none, got {threads}",
            hint="Leave --threads out.",
        )
    machine = Machine.of(bundle, device)
    plugins = load_plugins(bundle, machine.api)
    try:
        found = find_or_build(bundle, machine)
        check_run(Need.of(bundle.manifest.engine), machine.device, found.placement)
        return TensorRtEngine(bundle, machine, found, plugins, max_context)
    except BaseException:
        if plugins is not None:
            plugins.release()
        raise


class TensorRtEngine(Engine):
    """A deserialized engine; sessions share its weights, contexts and stream and have their own caches."""

    def __init__(
        self,
        bundle: Bundle,
        machine: Machine,
        cached: CachedEngine,
        plugins: PluginLibrary | None,
        max_context: int | None,
    ) -> None:
        self.manifest = bundle.manifest
        self.machine = machine
        self.cuda = machine.cuda
        self.placement = cached.placement
        self._closing: list[Any] = []
        self._sessions: dict[DeviceCaches, weakref.ref[TensorRtSession]] = {}
        try:
            self._runtime, self._engine = deserialize(machine.api, cached.path)
            self.io = EngineIo.of(machine.api, self._engine, bundle.manifest.cache["form"])
            self._check(bundle)
            self._stream_weights()
            self._open(bundle, cached)
        except BaseException:
            self._release()
            raise
        self._plugins = plugins
        self.chunk = self.io.chunk
        limit = min(self.manifest.context.max_context, self.io.capacity or self.manifest.context.max_context)
        self.max_context = min(max_context or limit, limit)

    def session(self) -> TensorRtSession:
        """A new, empty session.

        Raises:
            BackendError: the engine is closed, or there is no memory for another cache.
        """
        if not self._closing:
            raise BackendError("this engine is closed", hint="Open the bundle again with load().")
        self._sweep()
        with self.stepper.lock:
            caches = DeviceCaches(self.cuda, self.stream, self.io)
        session = TensorRtSession(self, caches)
        self._sessions[caches] = weakref.ref(session)
        return session

    def give_back(self, caches: DeviceCaches) -> None:
        """Free the caches of a session."""
        with self.stepper.lock:
            self._sessions.pop(caches, None)
            caches.free()

    def _sweep(self) -> None:
        """Free the caches of sessions that were dropped instead of closed."""
        # Not in a finalizer: garbage may be collected in the middle of a capture, which freeing would break.
        for caches in [each for each, session in self._sessions.items() if session() is None]:
            self.give_back(caches)

    def info(self) -> dict[str, Any]:
        api, device = self.machine.api, self.machine.device
        return {
            "engine": api.name,
            "flavour": self.manifest.flavour,
            "version": api.version,
            "device": DEVICE,
            "gpu": device.name,
            "sm": device.sm,
            "l4t": device.l4t,
            "threads": None,
            "max_context": self.max_context,
            "capacity": self.io.capacity,
            "prefill_chunk": self.chunk,
            "weights": self.placement.value,
            "workspace_bytes": self._contexts.workspace,
            "cuda_graph": self.stepper.uncaptured is None,
            **recurrent_info(self.manifest.cache),
        }

    def close(self) -> None:
        """Close all sessions and give everything back, the plugins last."""
        for caches, reference in list(self._sessions.items()):
            session = reference()
            if session is not None:
                session.close()
            self.give_back(caches)
        if self._closing:
            self._release()
            if self._plugins is not None:
                self._plugins.release()

    def _check(self, bundle: Bundle) -> None:
        capacity, expected = self.io.capacity, bundle.manifest.cache.get("capacity")
        if None not in (capacity, expected) and capacity != expected:
            raise BackendError(
                f"the engine: expected caches of {expected} rows, got {capacity}", hint=REBUILD
            )

    def _open(self, bundle: Bundle, cached: CachedEngine) -> None:
        cuda = self.cuda
        self.stream: Stream = self._owned(cuda.stream(), "destroy")
        weights: DeviceWeights = self._owned(DeviceWeights(cuda, self.stream, bundle, cached.weights), "free")
        missing = [name for name in self.io.weights if name not in weights.addresses]
        if missing:
            raise BackendError(f"the engine: unknown inputs {', '.join(missing[:5])}", hint=REBUILD)
        jit_cache = cached.path.with_name("kernels.cache") if self.machine.api.is_rtx else None
        if jit_cache is not None and cached.path.is_relative_to(bundle.path):
            jit_cache = EngineCache().folder / cached.identity.key / jit_cache.name
        self._contexts: Contexts = self._owned(
            Contexts(self.machine.api, cuda, self.stream, self._engine, jit_cache), "close"
        )
        embedding = HostEmbedding(bundle) if bundle.manifest.engine.get("embedding") else None
        streamed = "weights are streamed" if self.placement is Placement.STREAMED else None
        self.stepper: Stepper = self._owned(
            Stepper(
                self.machine.api,
                cuda,
                self.stream,
                self._contexts,
                self.io,
                embedding,
                weights.addresses,
                uncapturable=streamed,
            ),
            "free",
        )

    def _owned(self, thing: Any, release: str) -> Any:
        self._closing.append(getattr(thing, release))
        return thing

    def _stream_weights(self) -> None:
        """Keep as many streamable weights on the device as fit beside one session."""
        if self.placement is not Placement.STREAMED:
            return
        need = Need.of(self.manifest.engine)
        left = self.machine.device.available - (need.total - need.weights)
        self._engine.weight_streaming_budget_v2 = max(0, min(left, self._engine.streamable_weights_size))

    def _release(self) -> None:
        """In the opposite order of making; contexts before their engine, the engine before its runtime."""
        while self._closing:
            self._closing.pop()()
        for name in ("_engine", "_runtime"):
            self.__dict__.pop(name, None)
