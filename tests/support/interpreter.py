"""Launches of Triton kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from cpm_edge.plugins.kernel_config import KernelConfig

# The decorator of a kernel reads it, once: it must be there before a kernel's module is imported.
assert os.environ.get("TRITON_INTERPRET") == "1", "kernels are interpreted in a process of their own"


def launch(config: KernelConfig, **arguments: torch.Tensor | int | float) -> None:
    """Run a kernel with the arguments of a launch on a device, checked against what it promises."""
    assert list(arguments) == [each.name for each in config.parameters]
    integers: dict[str, int] = {}
    for parameter in config.parameters:
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            _check_tensor(parameter.type, value)
        elif isinstance(value, int):
            integers[parameter.name] = value
            assert not parameter.aligned or value % 16 == 0, parameter
    kernel: Any = getattr(importlib.import_module(config.module), config.function)
    kernel[config.grid_of(integers)](**arguments, **config.constants)


def _check_tensor(kind: str, tensor: torch.Tensor) -> None:
    types = {"*fp16": torch.float16, "*fp32": torch.float32, "*i32": torch.int32, "*u8": torch.uint8}
    assert tensor.dtype == types[kind]
    assert tensor.is_contiguous()
