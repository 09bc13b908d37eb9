"""The engine of a bundle: found in the cache folder or in the bundle, or built for this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpm_edge.runtimes.bundle import Bundle, check_engine
from cpm_edge.runtimes.cuda_runtime import Cuda, load_cuda
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.tensorrt.api import Api, PluginLibrary, load_api
from cpm_edge.runtimes.tensorrt.build import BuildSpec, build_engine, input_weights
from cpm_edge.runtimes.tensorrt.cache import (
    CachedEngine,
    EngineCache,
    EngineIdentity,
    check_identity,
    identity_of,
)
from cpm_edge.runtimes.tensorrt.device import Device, detect_device
from cpm_edge.runtimes.tensorrt.memory import (
    Need,
    Placement,
    check_weightless,
    choose_placement,
    workspace_limit,
)

if TYPE_CHECKING:
    import tensorrt as trt

MODEL = "model.onnx"
DEVICE = "cuda"
REBUILD = "Build it anew: cpm-run BUNDLE --build-only"


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


def find_or_build(bundle: Bundle, machine: Machine) -> CachedEngine:
    """The engine of the user's cache folder, the one in the bundle, or a new one.

    Raises:
        BackendError: the one in the bundle was built for something else, or the build fails.
    """
    identity = identity_of(bundle, machine.api.version, machine.device.sm)
    cache = EngineCache()
    found = cache.find(identity) or _ahead_of_time(bundle, identity)
    return found if found is not None else _build(bundle, machine, cache, identity)


def build(bundle: Bundle, *, device: str = DEVICE) -> tuple[CachedEngine, bool]:
    """Have an engine in the cache folder without running it: what ``cpm-run --build-only`` does.

    One that is there already stays, if it is whole and the engine opens it.

    Returns:
        the engine and whether it was built now.

    Raises:
        BackendError: as ``engine.open_engine``.
    """
    machine = Machine.of(bundle, device)
    plugins = load_plugins(bundle, machine.api)
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
        deserialize(api, found.path)
        return found
    except BackendError:  # built for something else, or unreadable: what this command is for
        return None


def load_plugins(bundle: Bundle, api: Api) -> PluginLibrary | None:
    """The bundle's plugins, registered with the engine; None when it has none.

    Raises:
        BackendError: they do not load, or the engine has no plugins.
    """
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


def deserialize(api: Api, path: Path) -> tuple[trt.Runtime, trt.ICudaEngine]:
    """Load an engine file through a mapping, so that its bytes are not in memory twice.

    Raises:
        BackendError: the engine refuses it; with what it says.
    """
    api.log.clear()
    runtime: trt.Runtime = api.module.Runtime(api.logger)
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))
    if engine is None:
        raise BackendError(f"{api.name} {api.version} cannot load {path}{api.log.text()}", hint=REBUILD)
    return runtime, engine
