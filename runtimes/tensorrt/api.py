"""TensorRT and TensorRT-RTX behind one door: import, log, and the plugin library of a bundle.

Both have the same API in modules of different names. Types are those of ``tensorrt``; the module itself is a
value, because which one it is depends on the bundle.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_edge.plugins.tensorrt_library import NAMESPACE
from cpm_edge.runtimes.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt

ENGINES = ("tensorrt", "tensorrt_rtx")
_KEPT_LINES = 12
_HOW_TO_INSTALL = {
    "tensorrt": "This bundle runs on the Jetson that it was exported for. There: sudo apt install "
    "python3-libnvinfer, and make the virtual environment with --system-site-packages",
    "tensorrt_rtx": 'pip install "cpm-edge[rtx]"',
}


class Log:
    """What the engine reported: the last errors, newest last, or the last warnings where there is no error.

    The library keeps one logger for the whole process (the first it is given), so there is one a module.
    """

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._warnings: deque[str] = deque(maxlen=_KEPT_LINES)
        self.interrupted = False

    def add(self, line: str, *, warning: bool = False) -> None:
        (self._warnings if warning else self._errors).append(" ".join(line.split()))

    def clear(self) -> None:
        self._errors.clear()
        self._warnings.clear()

    def text(self) -> str:
        """The kept lines, each once, indented below the message they explain; empty without any."""
        return "".join(f"\n  {line}" for line in dict.fromkeys(self._errors or self._warnings))

    def has(self, phrase: str) -> bool:
        return any(phrase.lower() in line.lower() for line in (*self._errors, *self._warnings))


@dataclass(frozen=True)
class Api:
    """An imported module.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx"; module: what the import gave; logger: an ILogger that fills log.
    """

    name: str
    module: Any
    log: Log
    logger: trt.ILogger

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    def numpy_type(self, dtype: trt.DataType) -> Any:
        """The numpy type of a TensorRT one.

        Raises:
            BackendError: numpy has none (INT4, BF16).
        """
        try:
            return self.module.nptype(dtype)
        except TypeError as error:
            raise BackendError(f"{dtype}: expected a type that numpy has", hint=_EXPORT_AGAIN) from error


_EXPORT_AGAIN = "Export the bundle again."
_apis: dict[str, Api] = {}


def load_api(name: str) -> Api:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        BackendError: it is not installed, or its libraries do not load.
    """
    if name not in _apis:
        module = _import(name)
        log = Log()
        _apis[name] = Api(name, module, log, _make_logger(module, log))
    return _apis[name]


def _import(name: str) -> Any:
    if name not in ENGINES:
        raise BackendError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}", hint=_EXPORT_AGAIN)
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"the Python package {name!r} is needed here and cannot be imported: {error}",
            hint=_HOW_TO_INSTALL[name],
        ) from error
    # A folder that holds type stubs alone is imported as an empty namespace package.
    if not hasattr(module, "Builder"):
        raise BackendError(
            f"the Python package {name!r} is needed here and is not installed: "
            f"only type information was found, in {', '.join(getattr(module, '__path__', []))}",
            hint=_HOW_TO_INSTALL[name],
        )
    return module


def _make_logger(module: Any, log: Log) -> trt.ILogger:
    warning = module.ILogger.Severity.WARNING
    kept = (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR, warning)

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            try:
                if severity in kept:
                    log.add(msg, warning=severity == warning)
            except KeyboardInterrupt:  # must not cross the C++ frames above
                log.interrupted = True

    logger: trt.ILogger = Logger()
    return logger


class PluginLibrary:
    """A bundle's plugins in the registry of this process; ``release`` takes them out after the last user.

    Creators are found by name alone, and a library launches the kernels that lie beside it. So plugins of two
    bundles cannot be in one process at a time.
    """

    _lock = threading.Lock()
    _loaded: PluginLibrary | None = None

    def __init__(self, path: Path, registry: trt.IPluginRegistry, handle: Any) -> None:
        self.path = path
        self._registry = registry
        self._handle = handle
        self._users = 1

    @classmethod
    def load(cls, api: Api, path: Path, names: Sequence[str], version: str) -> PluginLibrary:
        """Register the library's creators, or take it again if it is the one that is loaded.

        Raises:
            BackendError: it does not load, another one is in this process, or a creator is missing.
        """
        with cls._lock:
            loaded = cls._loaded
            if loaded is not None:
                if loaded.path != path:
                    raise BackendError(
                        f"this process runs a bundle with plugins already ({loaded.path})",
                        hint="Close that model first, or open this bundle in another process.",
                    )
                loaded._users += 1
                return loaded
            registry: trt.IPluginRegistry = api.module.get_plugin_registry()
            library = cls(path, registry, _register(api, registry, path))
            try:
                _check_creators(registry, path, names, version)
            except BackendError:
                registry.deregister_library(library._handle)
                raise
            cls._loaded = library
            return library

    def release(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            if not self._users:
                PluginLibrary._loaded = None
                self._registry.deregister_library(self._handle)


def _register(api: Api, registry: trt.IPluginRegistry, path: Path) -> Any:
    api.log.clear()
    try:
        handle = registry.load_library(str(path))
    except Exception as error:  # noqa: BLE001 - pybind translates what the library throws as it likes
        api.log.add(str(error))
        handle = None
    if handle is None:
        if not api.log.text():
            api.log.add(_loading_error(path))
        raise BackendError(
            f"the plugin library {path.name} does not load in {api.name} {api.version}{api.log.text()}",
            hint=f"Look for missing libraries and a wrong architecture with: ldd {path}; file {path}. "
            "A library for another system or TensorRT needs another export.",
        )
    return handle


def _loading_error(path: Path) -> str:
    """What the system's loader says; not every release of TensorRT repeats it."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return "it loads, but its creators are registered already, or it was made for another TensorRT"


def _check_creators(registry: trt.IPluginRegistry, path: Path, names: Sequence[str], version: str) -> None:
    missing = [name for name in names if registry.get_creator(name, version, NAMESPACE) is None]
    if missing:
        found = sorted(
            f"{creator.plugin_namespace}::{creator.name} version {creator.plugin_version}"
            for creator in registry.all_creators
            if creator.plugin_namespace == NAMESPACE
        )
        raise BackendError(
            f"{path.name}: expected creators of {', '.join(missing)} version {version} in namespace "
            f"{NAMESPACE}, found {', '.join(found) or 'none there'}",
            hint="The bundle's graph and library do not belong together: export the bundle again.",
        )
