"""Launches of Triton kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from triton.runtime import interpreter

from cpm_edge.benchmarks.gpu_check.launcher import Tensors, prepare
from cpm_edge.plugins.launch_plan import LaunchPlan

# The decorator of a kernel reads it, once: it must be there before a kernel's module is imported.
assert os.environ.get("TRITON_INTERPRET") == "1", "kernels are interpreted in a process of their own"

_prepared: set[int] = set()
_call_prepared = interpreter.InterpretedFunction.__call__


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call from kernel to kernel, which looks through Triton's modules, 2 ms: once a launch is enough."""
    if id(function.fn.__globals__) in _prepared:
        return function.rewrite()(*args, **kwargs)
    _prepared.add(id(function.fn.__globals__))
    return _call_prepared(function, *args, **kwargs)


def _run(grid: Any, *args: Any, **kwargs: Any) -> Any:
    _prepared.clear()
    return _run_prepared(grid, *args, **kwargs)


_run_prepared = interpreter.GridExecutor.__call__
interpreter.InterpretedFunction.__call__ = _call
interpreter.GridExecutor.__call__ = _run
# Checks of every sum for overflow take a third of the time.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def truncate_tf32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What tensor cores read of float32 operands: the highest 19 bits."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _interpret_tf32() -> None:
    """Let tl.dot see tf32 operands where it says so; the interpreter's own one multiplies float32."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = (TensorHandle(truncate_tf32(each.data), each.dtype) for each in (a, b))
        return original(self, a, b, d, precision, imprecise)

    InterpreterBuilder.create_dot = create_dot


_interpret_tf32()


def run_plan(plan: LaunchPlan, inputs: Tensors, outputs: Tensors) -> None:
    """Execute an op's plan on CPU tensors, with scratch memory full of NaN; outputs in place are inputs."""
    prepare(plan, inputs, outputs, poison=True)()
