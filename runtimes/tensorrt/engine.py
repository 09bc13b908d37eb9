"""Bundles for Jetson (TensorRT) and for PCs with an NVIDIA GPU (TensorRT-RTX): find or build, load, run."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpm_edge.runtimes.bundle import Bundle, check_engine
from cpm_edge.runtimes.cache_layout import recurrent_info
from cpm_edge.runtimes.cuda_runtime import Cuda, Stream, load_cuda
from cpm_edge.runtimes.embedding import HostEmbedding
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.session import Engine
from cpm_edge.runtimes.tensorrt.api import Api, PluginLibrary, load_api
from cpm_edge.runtimes.tensorrt.build import BuildSpec, build_engine, input_weights
from cpm_edge.runtimes.tensorrt.cache import (
    CachedEngine,
    EngineCache,
    EngineIdentity,
    check_identity,
    identity_of,
)
from cpm_edge.runtimes.tensorrt.caches import DeviceCaches
from cpm_edge.runtimes.tensorrt.contexts import Contexts
from cpm_edge.runtimes.tensorrt.device import Device, detect_device
from cpm_edge.runtimes.tensorrt.io import EngineIo
from cpm_edge.runtimes.tensorrt.memory import (
    Need,
    Placement,
    check_run,
    check_weightless,
    choose_placement,
    workspace_limit,
)
from cpm_edge.runtimes.tensorrt.session import TensorRtSession
from cpm_edge.runtimes.tensorrt.step import Stepper
from cpm_edge.runtimes.tensorrt.weights import DeviceWeights

if TYPE_CHECKING:
    import tensorrt as trt

MODEL = "model.onnx"
DEVICE = "cuda"
_REBUILD = "Build it anew: cpm-run BUNDLE --build-only"


@dataclass(frozen=True)
class Machine:
    """What a bundle is opened with."""

    api: Api
    cuda: Cuda
    device: Device

    @classmethod
    def of(cls, bundle: Bundle, device: str) -> Machine:
        """Look at this machine with the bundle's needs in mind.

        Raises:
            BackendError: no engine, no GPU, another version, or kernels of another chip.
        """
        engine = bundle.manifest.engine
        if device.lower() != DEVICE:
            raise BackendError(
                f"device: expected {DEVICE} for a {bundle.manifest.target} bundle, got {device}",
                hint=f"Use --device {DEVICE}, or export with --target ort or aipc for other devices.",
            )
        api = load_api(engine["name"])
        check_engine(engine["requires"], api.version, name=f"the engine {api.name}")
        cuda = load_cuda()
        found = detect_device(cuda)
        if engine.get("sm") not in (None, found.sm):
            raise BackendError(
                f"the bundle's kernels are compiled for SM {engine['sm']} ({bundle.manifest.chip}), "
                f"this device is {found}",
                hint="Export for this chip: cpm-export --target jetson --chip ID",
            )
        return cls(api, cuda, found)


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
    plugins = _load_plugins(bundle, machine.api)
    try:
        identity = identity_of(bundle, machine.api.version, machine.device.sm)
        cache = EngineCache()
        found = cache.find(identity) or _ahead_of_time(bundle, identity)
        if found is None:
            found = _build(bundle, machine, cache, identity)
        check_run(Need.of(bundle.manifest.engine), machine.device, found.placement)
        return TensorRtEngine(bundle, machine, found, plugins, max_context)
    except BaseException:
        if plugins is not None:
            plugins.release()
        raise


def build(bundle: Bundle, *, device: str = DEVICE) -> tuple[CachedEngine, bool]:
    """Have an engine in the cache folder without running it: what ``cpm-run --build-only`` does.

    One that is there already stays, if it is whole and the engine opens it.

    Returns:
        the engine and whether it was built now.

    Raises:
        as ``open_engine``.
    """
    machine = Machine.of(bundle, device)
    plugins = _load_plugins(bundle, machine.api)
    try:
        identity = identity_of(bundle, machine.api.version, machine.device.sm)
        cache = EngineCache()
        found = _usable(machine.api, cache, identity)
        return (found, False) if found else (_build(bundle, machine, cache, identity), True)
    finally:
        if plugins is not None:
            plugins.release()


def _usable(api: Api, cache: EngineCache, identity: EngineIdentity) -> CachedEngine | None:
    try:
        found = cache.find(identity)
        if found is None or not found.intact():
            return None
        _deserialize(api, found.path)
        return found
    except BackendError:  # built for something else, or unreadable: what this command is for
        return None


def _load_plugins(bundle: Bundle, api: Api) -> PluginLibrary | None:
    plugins = bundle.manifest.engine.get("plugins")
    if not plugins:
        return None
    if api.is_rtx:
        raise BackendError(
            f"{api.name} has no plugins, but the bundle needs {plugins['library']}",
            hint="Export with: --target rtx",
        )
    path = bundle.file(plugins["library"])
    return PluginLibrary.load(api, path, plugins.get("names", ()), str(plugins["version"]))


def _ahead_of_time(bundle: Bundle, identity: EngineIdentity) -> CachedEngine | None:
    """The engine inside the bundle, if it has one."""
    plan = bundle.manifest.engine.get("plan")
    if plan is None:
        return None
    path = bundle.file(plan["file"])
    sm = identity.sm if identity.sm in plan["sm"] else plan["sm"][0]
    built_for = EngineIdentity(identity.bundle, identity.engine, plan["version"], sm, identity.plugins)
    check_identity(built_for, identity, str(path))
    entry = bundle.manifest.files[plan["file"]]
    return CachedEngine(path, identity, Placement.ENGINE, (), entry.sha256, entry.bytes, 0.0)


def _build(bundle: Bundle, machine: Machine, cache: EngineCache, identity: EngineIdentity) -> CachedEngine:
    engine = bundle.manifest.engine
    need = Need.of(engine)
    placement = choose_placement(need, machine.device)
    model = bundle.file(MODEL)
    if placement is Placement.INPUTS:
        outside = sum(tensor.nbytes for tensor in input_weights(model.read_bytes()))
        check_weightless(need, outside, machine.device)
    spec = BuildSpec(
        model=model,
        prefill_chunk=int(engine["prefill_chunk"]),
        vocab_size=bundle.manifest.vocab_size,
        workspace=workspace_limit(need, machine.device),
        aliased=bundle.manifest.cache["form"] == "in_place",
        placement=placement,
        sms=(machine.device.sm,) if machine.api.is_rtx else (),
    )
    with cache.writing():
        pass  # a folder that cannot be written should be known before a build of minutes
    began = time.monotonic()
    built = build_engine(machine.api, spec, timing_cache=cache.timings(identity))
    seconds = time.monotonic() - began
    return cache.store(identity, memoryview(built.plan), placement, built.weights, seconds)


def _deserialize(api: Api, path: Path) -> tuple[trt.Runtime, trt.ICudaEngine]:
    """Load an engine file through a mapping, so that its bytes are not in memory twice.

    Raises:
        BackendError: the engine refuses it; with what it says.
    """
    api.log.clear()
    runtime: trt.Runtime = api.module.Runtime(api.logger)
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))
    if engine is None:
        raise BackendError(f"{api.name} {api.version} cannot load {path}{api.log.text()}", hint=_REBUILD)
    return runtime, engine


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
            self._runtime, self._engine = _deserialize(machine.api, cached.path)
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
                f"the engine: expected caches of {expected} rows, got {capacity}", hint=_REBUILD
            )

    def _open(self, bundle: Bundle, cached: CachedEngine) -> None:
        cuda = self.cuda
        self.stream: Stream = self._owned(cuda.stream(), "destroy")
        weights: DeviceWeights = self._owned(DeviceWeights(cuda, self.stream, bundle, cached.weights), "free")
        missing = [name for name in self.io.weights if name not in weights.addresses]
        if missing:
            raise BackendError(f"the engine: unknown inputs {', '.join(missing[:5])}", hint=_REBUILD)
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
