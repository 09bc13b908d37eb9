"""Compile kernels for sm_87 and launch them with Triton's own launcher: launches as JSON on stdin."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource

from cpm_edge.plugins.kernel_config import ALIGNMENT, KernelConfig


def main() -> None:
    # Without torch Triton asks the driver itself for the context and the stream.
    assert "torch" not in sys.modules
    triton.runtime.driver.set_active(CudaDriver())
    for launch in json.load(sys.stdin):
        _launch(KernelConfig.from_json(launch["config"]), launch["grid"], launch["arguments"])


def _launch(config: KernelConfig, grid: list[int], arguments: list[int | float]) -> None:
    function: Any = getattr(importlib.import_module(config.module), config.function)
    number = {name: index for index, name in enumerate(function.arg_names)}
    attributes = {
        (number[each.name],): [["tt.divisibility", ALIGNMENT]] for each in config.parameters if each.aligned
    }
    source = ASTSource(
        function,
        {name: config.signature[name] for name in function.arg_names},
        constexprs={(number[name],): value for name, value in config.constants.items()},
        attrs=attributes,
    )
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "ptx_version": int(sys.argv[1]),
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", 87, 32), options=options)
    names = (each.name for each in config.parameters)
    by_name = {**config.constants, **dict(zip(names, arguments, strict=True))}
    kernel[tuple(grid)](*(by_name[name] for name in function.arg_names))


if __name__ == "__main__":
    main()
