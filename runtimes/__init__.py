"""Run a bundle: ``model = load("bundle/")``, then ``model.stream``, ``model.chat`` or ``model.session``.

Importing this package loads no engine, no torch and no transformers; ``load`` imports the engine it needs.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from cpm_edge.runtimes.errors import BackendError, BundleError, ContextError

if TYPE_CHECKING:
    from cpm_edge.runtimes.bundle import Bundle
    from cpm_edge.runtimes.model import Model
    from cpm_edge.runtimes.session import Engine

__all__ = ["load", "open_engine"]

MOST_THREADS = 1024

# Each module has open_engine(bundle, *, device, threads, max_context) -> Engine.
_ENGINES = {"ort": "cpm_edge.runtimes.ort", "aipc": "cpm_edge.runtimes.openvino"}
_NATIVE = "cpm_edge.runtimes.openvino_native"


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "CPU",
    threads: int | None = None,
    max_context: int | None = None,
    check: bool = False,
    flavour: str | None = None,
) -> Model:
    """Check a bundle and open it on an engine.

    Args:
        path: the bundle folder.
        device: "CPU", "GPU", "NPU" or "cuda", as far as the bundle's target has them.
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


def open_engine(
    bundle: Bundle, device: str = "CPU", threads: int | None = None, max_context: int | None = None
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
        module = _NATIVE
    engine: Engine = importlib.import_module(module).open_engine(
        bundle, device=device, threads=threads, max_context=max_context
    )
    return engine


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
