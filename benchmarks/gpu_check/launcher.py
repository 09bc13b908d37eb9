"""Launch plans executed by Triton itself: on a GPU, or on CPU tensors where Triton interprets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch

from cpm_edge.plugins.kernel_config import ALIGNMENT, KernelConfig, Parameter
from cpm_edge.plugins.launch_plan import ROWS, Argument, Buffer, LaunchPlan

_TYPES = {
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*i32": torch.int32,
    "*i64": torch.int64,
    "*u8": torch.uint8,
}
Tensors = Sequence[torch.Tensor | None]


def prepare(
    plan: LaunchPlan, inputs: Tensors, outputs: Tensors, *, poison: bool = False
) -> Callable[[], None]:
    """What runs the plan on these tensors, as often as it is called.

    Args:
        inputs, outputs: of the op in order, None where it has none; an output that the op updates in place
            is the input's tensor. Bytes may be int8, as TensorRT hands them over.
        poison: fill scratch memory with NaN first.

    Raises:
        ValueError: a missing tensor, or one of another type, not contiguous or not aligned as promised.
    """
    first = inputs[0]
    if first is None:
        raise ValueError("input:0: expected a tensor, got none")
    rows = prod(first.shape[:-1])
    offsets = plan.offsets(rows)
    scratch = torch.empty(max(offsets[""], 1), dtype=torch.uint8, device=first.device)
    if poison:
        scratch.fill_(0xFF)
    buffers = {f"input:{index}": each for index, each in enumerate(inputs)}
    buffers |= {f"output:{index}": each for index, each in enumerate(outputs)}
    for each in plan.workspaces:
        start = offsets[each.name]
        buffers[f"workspace:{each.name}"] = scratch[start : start + each.nbytes(rows)]

    def value(parameter: Parameter, argument: Argument) -> torch.Tensor | int | float:
        if isinstance(argument, Buffer):
            return _typed(str(argument), buffers.get(str(argument)), parameter)
        return rows if argument == ROWS else argument

    calls = []
    for launch in plan.variant(rows).launches:
        kernel = launch.kernel
        arguments = {each.name: value(each, launch.arguments[each.name]) for each in kernel.parameters}
        calls.append(_call(kernel, launch.grid(rows), arguments))

    def run() -> None:
        for call in calls:
            call()

    return run


def _call(
    kernel: KernelConfig, grid: tuple[int, int, int], arguments: dict[str, torch.Tensor | int | float]
) -> Callable[[], object]:
    function = getattr(importlib.import_module(kernel.module), kernel.function)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return partial(function[grid], **arguments, **kernel.constants, **options)


def _typed(name: str, tensor: torch.Tensor | None, parameter: Parameter) -> torch.Tensor:
    """The tensor as the kernel's parameter takes it."""
    if tensor is None:
        raise ValueError(f"{name}: expected a tensor for {parameter.name}, got none")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    wanted = _TYPES[parameter.type]
    if name.startswith("workspace:") or tensor.dtype == torch.int8:
        tensor = tensor.view(wanted)
    if tensor.dtype != wanted:
        raise ValueError(f"{name}: expected {wanted} for {parameter.name}, got {tensor.dtype}")
    if parameter.aligned and tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name}: expected an address that is a multiple of {ALIGNMENT}")
    return tensor
