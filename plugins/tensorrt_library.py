"""TensorRT's plugins: one shared library for each machine, built from ``csrc/tensorrt``.

A bundle for a Jetson holds the library for aarch64 with the kernels that its model needs beside it, in
``kernels``. TensorRT's plugin registry loads it; the runtime needs nothing else of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cpm_edge.plugins.native import NativeError

# Of the ops' tensors, attributes and plans; ``kVersion`` in csrc/tensorrt/plugin.h. An engine that was built
# with another one must be built again.
PLUGIN_VERSION: Final = "1"
NAMESPACE: Final = "cpm"
MACHINES = ("x86_64", "aarch64")
_REPAIR = (
    "apt-get install g++ g++-aarch64-linux-gnu nlohmann-json3-dev, then in the folder of cpm-edge's sources: "
    'pip install --no-build-isolation --force-reinstall --no-deps . (after pip install ".[jetson-export]")'
)


def library(machine: str) -> Path:
    """The plugin library for a machine, ``x86_64`` or ``aarch64``.

    Raises:
        NativeError: it was not built, or there is none for this machine.
    """
    if machine not in MACHINES:
        raise NativeError(f"TensorRT plugins: expected a machine of {', '.join(MACHINES)}, got {machine}")
    path = Path(__file__).parent / "lib" / f"libcpm_tensorrt-{machine}.so"
    if not path.is_file():
        raise NativeError(f"TensorRT plugins for {machine}: expected {path}, which was not built; {_REPAIR}")
    return path
