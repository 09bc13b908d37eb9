"""Exports of the tiny checkpoints, each made once a test session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.exporter import eager, trace
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.export import ExportResult, Plan, export, prepare
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import Bundle, open_bundle
from cpm_edge.runtimes.session import Engine
from tests.support import gguf_file, numpy_model
from tests.support.checkpoints import (
    config_of,
    gguf_of,
    gguf_sources,
    prompt,
    stored_of,
    tensors_of,
    write_checkpoint,
)
from tests.support.gguf_file import GGUFS

# Past 4 times dense_len (64) and past the budget of 5 blocks of 16; not a multiple of anything.
PROMPT_LENGTH = 333
TARGETS = ("ort", "aipc")
# Options of an export that runs on our own kernels.
NATIVE: dict[str, Any] = {
    "weight_format": "int4",
    "group_size": 32,
    "flavour": "native",
    "activations": "int8",
}


class Bundles:
    """Makes what is asked for and keeps it.

    Args:
        root: folder for checkpoints and bundles.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prompt = prompt(PROMPT_LENGTH)
        self.checkpoint = cache(self._checkpoint)
        self.result = cache(self._result)
        self.engine = cache(self._engine)
        self.reference = cache(self._reference)
        self.stored = cache(self._stored)

    def options(self, variant: str, target: str, **options: Any) -> ExportOptions:
        """Options of an export into a folder of its own; all fp32 and unverified unless asked otherwise."""
        if options.get("flavour") == "native":
            options = {"activations": "int8", **options}
        name = "-".join([variant, target, *(f"{key}={value}" for key, value in sorted(options.items()))])
        usual: dict[str, Any] = {"weight_format": "fp32", "activations": "fp32", "verify": False}
        return ExportOptions(
            model=str(self.checkpoint(variant)),
            target=target,
            output=self.root / "bundles" / name,
            **(usual | options),
        )

    def open(self, variant: str, target: str, **options: Any) -> Bundle:
        return open_bundle(self.result(variant, target, **options).folder)

    @contextlib.contextmanager
    def plan(self, variant: str, target: str, **options: Any) -> Iterator[tuple[Plan, ModelWeights]]:
        """The settled export and its weights, for a test that reads them again; no graph is traced."""
        with open_checkpoint(str(self.checkpoint(variant))) as checkpoint:
            plan = prepare(self.options(variant, target, **options), checkpoint)
            constants = {"rotary.inv_freq": plan.config.rope.table(plan.max_context).inv_freq}
            shapes = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
            shapes |= {name: array.shape for name, array in constants.items()}
            yield plan, ModelWeights(checkpoint, shapes, constants, plan.policy, plan.taken)

    def _checkpoint(self, variant: str) -> Path:
        folder = self.root / "checkpoints" / variant
        if variant in GGUFS:
            file = folder / "tiny.gguf"
            return gguf_file.write(file, config_of(variant), gguf_sources(variant), gguf_of(variant))
        return write_checkpoint(folder, config_of(variant), stored_of(variant))

    def _result(self, variant: str, target: str, **options: Any) -> ExportResult:
        return export(self.options(variant, target, **options), Progress(enabled=False))

    def _engine(self, variant: str, target: str, **options: Any) -> Engine:
        return open_engine(self.open(variant, target, **options), threads=2)

    def _reference(self, variant: str) -> numpy_model.NumpyRun:
        return numpy_model.run(config_of(variant), tensors_of(variant), self.prompt)

    def _stored(self, variant: str, target: str, **options: Any) -> npt.NDArray[np.float32]:
        """Logits (T, vocab) of the torch modules on the weights as the bundle stores them."""
        with self.plan(variant, target, **options) as (plan, weights):
            rope = plan.config.rope.table(plan.max_context)
            model = plan.architecture.model_class()
            ids = self.prompt.tolist()
            run = eager.run_streamed(model, plan.config, rope, weights.dequantized, ids)
            return np.asarray(run.logits)


def torch_functions_once() -> Callable[..., Any]:
    """The table of ONNX functions that ``torch.onnx.export`` makes anew for every part of a model, kept."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return staticmethod(cache(ONNXRegistry.from_torchlib))


def trace_once(original: Callable[..., ir.Model] = trace.trace) -> Callable[..., ir.Model]:
    """A ``trace`` that hands out copies of what it traced before: tracing is most of a tiny export."""
    known: dict[str, ir.Model] = {}

    def traced(model_class: type[Any], config: Any, rope: Any) -> ir.Model:
        key = f"{model_class.__module__} {config} {rope.scaling}"
        if key not in known:
            known[key] = original(model_class, config, rope)
        return known[key].clone()

    return traced
