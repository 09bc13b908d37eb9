"""Which optional packages an export needs: checked before one of them is imported or anything is read."""

from __future__ import annotations

from importlib.util import find_spec

from cpm_edge.plugins.native import REBUILD, NativeError, extension_path
from cpm_edge.plugins.tensorrt_library import library
from cpm_edge.runtimes.errors import BackendError, missing_dependency

JETSON_MACHINE = "aarch64"
# Module to the extra of cpm-edge that installs it. Packages that only some checkpoints need are not here.
ALWAYS = dict.fromkeys(("gguf", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "torch"), "export")
BY_TARGET = {
    "ort": {"onnxruntime": "ort"},
    "jetson": {"onnxruntime": "ort"},  # verifies the graph
    "rtx": {"onnxruntime": "ort"},
    "aipc": {"openvino": "aipc", "openvino_tokenizers": "aipc", "transformers": "export"},
}
NATIVE = {"jetson": {"triton": "jetson-export"}}


def check_packages(target: str, flavour: str = "stock") -> None:
    """Look for the packages of one target, and the libraries of one flavour, without loading them.

    Raises:
        BackendError: names the first one that is not installed, and one pip line for all that are missing;
            or says that the native libraries were not built.
    """
    needed = ALWAYS | BY_TARGET[target] | (NATIVE.get(target, {}) if flavour == "native" else {})
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise missing_dependency(missing[0], ",".join(sorted({needed[module] for module in missing})))
    if flavour == "native":
        try:
            library(JETSON_MACHINE) if target == "jetson" else extension_path()
        except NativeError as error:
            hint = "Use --flavour stock." if target == "jetson" else f"{REBUILD} Or use --flavour stock."
            raise BackendError(f"--flavour native: {error}", hint=hint) from error
