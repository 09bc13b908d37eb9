"""Which optional packages an export needs: checked before one of them is imported or anything is read."""

from __future__ import annotations

from importlib.util import find_spec

from cpm_edge.runtimes.errors import missing_dependency

# Module to the extra of cpm-edge that installs it. Packages that only some checkpoints need are not here.
ALWAYS = dict.fromkeys(("gguf", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "torch"), "export")
BY_TARGET = {
    "ort": {"onnxruntime": "ort"},
    "aipc": {"openvino": "aipc", "openvino_tokenizers": "aipc", "transformers": "export"},
}


def check_packages(target: str) -> None:
    """Look for the packages of one target without importing them.

    Raises:
        BackendError: names the first one that is not installed, and one pip line for all that are missing.
    """
    needed = ALWAYS | BY_TARGET[target]
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise missing_dependency(missing[0], ",".join(sorted({needed[module] for module in missing})))
