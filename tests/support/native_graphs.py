"""Small graphs of native ops, made by hand: what the exporter would not write, and no checkpoint needed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import openvino as ov

from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.native import load_extension

VOCAB = 11


@cache
def core() -> ov.Core:
    """Kept: our library is unloaded with its last core and model, and a node must not outlive that."""
    made = ov.Core()
    load_extension(made)
    return made


class NativeGraph:
    """A graph for one token.

    Attributes:
        x: the embedding, (1, 1, width).
        tables: cosines and sines, (1, 1, size / 2), by "cosine" or "sine" and the size of the heads, 8 or 16.
        past: the position, (1,).
    """

    def __init__(self, width: int) -> None:
        inputs = [
            _input("input_ids", [1, 1], ir.DataType.INT64),
            _input("past_length", [1], ir.DataType.INT64),
            _input("session", [8], ir.DataType.UINT8),
        ]
        opsets = {"": 21, DOMAIN: VERSION}
        self._graph = ir.Graph(inputs, [], nodes=[], opset_imports=opsets, name="native")
        self._builder = Builder(self._graph)
        tokens, self.past, self._session = inputs
        table = np.random.default_rng(width).standard_normal((VOCAB, width))
        self.x = self.op("Gather", [self.constant("table", table), tokens], "embedding")
        position = self.op("Cast", [self.past], "position", to=ir.DataType.FLOAT.value)
        self.tables: dict[str, ir.Value] = {}
        for size in (8, 16):
            frequencies = self.constant(f"frequencies{size}", 0.5 ** np.arange(size // 2).reshape(1, 1, -1))
            angle = self.op("Mul", [position, frequencies], f"angle{size}")
            self.tables[f"cosine{size}"] = self.op("Cos", [angle], f"cosine{size}")
            self.tables[f"sine{size}"] = self.op("Sin", [angle], f"sine{size}")

    def constant(self, name: str, array: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> ir.Value:
        return self._builder.constant(name, array, dtype)

    def parameter(self, name: str, shape: list[int]) -> ir.Value:
        """A float32 input of the graph."""
        self._graph.inputs.append(_input(name, shape, ir.DataType.FLOAT))
        return self._graph.inputs[-1]

    def op(self, kind: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """A node of ONNX."""
        return self._builder.op(kind, inputs, attributes, name=name)

    def native(self, kind: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """A node of ours, with the session as its last input."""
        return self._builder.op(kind, [*inputs, self._session], attributes, name=name, domain=DOMAIN)

    def model(self, logits: ir.Value) -> ov.Model:
        """The graph as OpenVINO reads it."""
        logits.dtype = ir.DataType.FLOAT
        self._graph.outputs.append(logits)
        self._graph.extend(self._builder.nodes)
        made = ir.Model(self._graph, ir_version=10)
        return core().read_model(ir.serde.serialize_model(made).SerializeToString())


def _input(name: str, shape: list[int], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
