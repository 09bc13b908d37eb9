"""Run a bundle: ``model = load("bundle/")``, then ``model.stream``, ``model.chat`` or ``model.session``.

Importing this package loads no engine, no torch and no transformers; ``load`` imports the engine it needs.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpm_edge.runtimes.errors import BackendError, BundleError, ContextError

if TYPE_CHECKING:
    from cpm_edge.runtimes.bundle import Bundle
    from cpm_edge.runtimes.model import Model
    from cpm_edge.runtimes.session import Engine

__all__ = ["build", "default_device", "load", "open_engine"]

MOST_THREADS = 1024

# Each module has open_engine(bundle, *, device, threads, max_context) -> Engine.
_TENSORRT = "cpm_edge.runtimes.tensorrt.engine"
_ENGINES = {
    "ort": "cpm_edge.runtimes.ort",
    "aipc": "cpm_edge.runtimes.openvino.stock",
    "jetson": _TENSORRT,
    "rtx": _TENSORRT,
}
_NATIVE = {"aipc": "cpm_edge.runtimes.openvino.native"}
# Targets whose engine is built on the device; they run on its GPU.
_BUILT = ("jetson", "rtx")


@dataclass(frozen=True)
class BuildReport:
    """An engine in the cache folder.

    Attributes:
        seconds: that its build took; placement: "engine", "inputs" or "streamed", where the weights are.
        new: it was built now; False when it was there already.
    """

    path: Path
    nbytes: int
    seconds: float
    placement: str
    new: bool


def load(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    threads: int | None = None,
    max_context: int | None = None,
    check: bool = False,
    flavour: str | None = None,
) -> Model:
    """Check a bundle and open it on an engine.

    Args:
        path: the bundle folder.
        device: "CPU", "GPU", "NPU" or "cuda", as far as the bundle's target has them. None is "cuda" for
            jetson and rtx, and "CPU" for the others.
        threads: CPU threads; None leaves it to the engine.
        max_context: a smaller context than the bundle's, to save cache memory.
        check: hash every file again instead of trusting what was checked before.
        flavour: "native" or "stock", where the bundle holds both.

    Raises:
        BundleError: the bundle is damaged, unsafe, too new, or has no engine here.
        BackendError: the engine is not installed, too old, or cannot use the device.
        ContextError: max_context is above the bundle's limit.
    """
    from cpm_edge.runtimes.bundle import open_bundle
    from cpm_edge.runtimes.model import Model
    from cpm_edge.runtimes.stats import Clock

    clock = Clock()
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise BackendError(
            f"threads: expected 1 to {MOST_THREADS}, got {threads}",
            hint="Leave it out for the engine's own choice.",
        )
    bundle = open_bundle(path, check=check)
    _check_flavour(bundle, flavour)
    _check_context(bundle, max_context)
    engine = open_engine(bundle, device, threads, max_context)
    try:
        model = Model.from_bundle(bundle, engine, max_context=max_context)
    except BaseException:
        engine.close()
        raise
    model.load_seconds = clock.seconds()
    return model


def build(path: str | os.PathLike[str], *, check: bool = False) -> BuildReport:
    """Build the engine of a jetson or rtx bundle into the user's cache folder, without running it.

    Raises:
        BundleError: the bundle is damaged, or its target has nothing to build.
        BackendError: the engine or the GPU is missing, or the build fails; see tensorrt.acquire.
    """
    from cpm_edge.runtimes.bundle import open_bundle

    bundle = open_bundle(path, check=check)
    if bundle.manifest.target not in _BUILT:
        raise BundleError(
            f"target {bundle.manifest.target}: there is no engine to build",
            hint="Run it without --build-only; bundles of --target jetson and rtx have one.",
        )
    from cpm_edge.runtimes.tensorrt import acquire

    cached, new = acquire.build(bundle)
    return BuildReport(cached.path, cached.nbytes, cached.seconds, cached.placement.value, new)


def open_engine(
    bundle: Bundle, device: str | None = None, threads: int | None = None, max_context: int | None = None
) -> Engine:
    """The bundle's engine alone, without tokenizer; ``load`` is what applications call.

    Raises:
        BundleError: no engine here runs the bundle's target.
        BackendError: the engine is not installed, too old, or cannot use the device.
    """
    module = _ENGINES.get(bundle.manifest.target)
    if module is None:
        raise BundleError(
            f"target: expected one of {', '.join(sorted(_ENGINES))}, got {bundle.manifest.target!r}",
            hint="This version of the runtime has no engine for that target; export for another --target.",
        )
    if bundle.manifest.flavour == "native":
        module = _NATIVE.get(bundle.manifest.target, module)
    engine: Engine = importlib.import_module(module).open_engine(
        bundle, device=device or default_device(bundle), threads=threads, max_context=max_context
    )
    return engine


def default_device(bundle: Bundle) -> str:
    """cuda for targets whose engine is built on the device, else CPU."""
    return "cuda" if bundle.manifest.target in _BUILT else "CPU"


def _check_flavour(bundle: Bundle, flavour: str | None) -> None:
    held = bundle.manifest.flavour
    if flavour is not None and held not in (flavour, "both"):
        raise BundleError(
            f"flavour: the bundle holds {held or 'only one graph'}, asked for {flavour}",
            hint=f"Export it with: --flavour {flavour}",
        )


def _check_context(bundle: Bundle, max_context: int | None) -> None:
    limit = bundle.manifest.context.max_context
    if max_context is not None and not 1 <= max_context <= limit:
        raise ContextError(
            f"max_context: expected 1 to {limit} (what the bundle was exported for), got {max_context}",
            hint=f"Leave it out, or export again with: --max-context {max_context}",
        )
