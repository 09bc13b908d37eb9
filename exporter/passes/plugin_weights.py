"""Weights of the native flavour: integers as the Triton kernels read them, in CpmMatMulNBits nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.engine_weights import EngineWeights
from cpm_edge.exporter.passes.linear import Linear, find_linears
from cpm_edge.exporter.weight_file import WeightFile
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.launch_plan import LaunchPlan
from cpm_edge.plugins.matmul_nbits.body import NAME
from cpm_edge.plugins.matmul_nbits.launches import matmul_plan
from cpm_edge.plugins.matmul_nbits.spans import GROUPS, Spans, check_shape, pack_spans, span_of
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.tensorrt_library import NAMESPACE, PLUGIN_VERSION
from cpm_edge.quant import Quantized, Scheme

STOCK = "--flavour stock"


def plugin_attributes(plan: LaunchPlan) -> dict[str, str]:
    """Attributes of every plugin node."""
    return {"plugin_version": PLUGIN_VERSION, "plugin_namespace": NAMESPACE, "plan": plan.to_json()}


@dataclass
class _Parts:
    """Scales and zero points of the row blocks so far, (groups, rows) each."""

    scales: list[npt.NDArray[np.float16]] = field(default_factory=list)
    zeros: list[npt.NDArray[np.int8]] = field(default_factory=list)


class PluginWeights(EngineWeights):
    """EngineWeights whose integers are products of their own.

    Args:
        plans: takes the launch plan of every format and size.
    """

    byte_format = "uint8"  # code 128 is zero

    def __init__(
        self,
        graph: ir.Graph,
        weights: ModelWeights,
        file: WeightFile,
        progress: Callable[[int], None],
        plans: list[LaunchPlan],
    ) -> None:
        super().__init__(graph, weights, file, progress)
        self._plans = plans
        self._linears: dict[str, list[Linear]] = {}

    def run(self) -> None:
        """As EngineWeights, then every product with packed weights becomes a plugin node."""
        for linear in find_linears(self.graph):
            self._linears.setdefault(linear.weight.name or "", []).append(linear)
        super().run()

    def write_integers(self, name: str, value: ir.Value, scheme: Scheme) -> None:
        """Codes int8 (N, row bytes), scales float16 and zeros int8 (groups, N), and their nodes."""
        linears = self._linears.get(name, [])
        if len(linears) != len(value.uses()) or not linears:
            raise ExportError(f"tensor {name}: expected a product's weight", hint=STOCK)
        shape = self._shape(name, scheme)
        inputs = self._write(name, shape)
        for linear in linears:
            self._replace(linear, shape, inputs, name)
        for transpose in {linear.transpose for linear in linears}:
            if not transpose.outputs[0].uses():
                self.graph.remove(transpose, safe=True)
        self.graph.initializers.pop(name)

    def _shape(self, name: str, scheme: Scheme) -> NBitsShape:
        """What the kernels take; larger groups are split."""
        rows, cols = self.weights.shapes[name]
        bits = scheme.bits
        width = scheme.group_size or cols
        if bits == 8:
            group = 0 if width == cols else width
        else:
            group = next((size for size in reversed(GROUPS) if width % size == 0), width)
        try:
            shape = NBitsShape(rows, cols, bits, group, scheme.symmetric)
            check_shape(shape)
        except ValueError as error:
            raise ExportError(f"tensor {name} is {scheme.describe()}: {error}", hint=STOCK) from error
        return shape

    def _write(self, name: str, shape: NBitsShape) -> list[ir.Value]:
        parts = _Parts()

        def codes() -> Iterator[npt.NDArray[Any]]:
            for quantized in self.weights.quantized(name):
                packed = _packed(shape, quantized)
                parts.scales.append(packed.scales)
                if packed.zeros is not None:
                    parts.zeros.append(packed.zeros.view(np.int8))
                yield packed.codes

        int8, rows = ir.DataType.INT8, shape.rows
        width = packed_width(shape)
        found = [self.stored(f"{name}.codes", name, codes(), int8, [rows, width])]
        for part, blocks, dtype in (
            ("scales", parts.scales, ir.DataType.FLOAT16),
            ("zeros", parts.zeros, int8),
        ):
            if blocks:
                whole = np.concatenate(blocks, axis=1)
                found.append(self.stored(f"{name}.{part}", name, [whole], dtype, list(whole.shape)))
        return found

    def _replace(self, linear: Linear, shape: NBitsShape, inputs: list[ir.Value], name: str) -> None:
        sizes = {"bits": shape.bits, "group": shape.group, "n": shape.rows, "k": shape.cols}
        plan = matmul_plan(shape)
        self._plans.append(plan)
        attributes = sizes | plugin_attributes(plan)
        builder = Builder(self.graph)
        layer = name.removesuffix(".weight")
        builder.op(NAME, [linear.x, *inputs], attributes, name=layer, domain=DOMAIN)
        ir.convenience.replace_nodes_and_values(
            self.graph, linear.matmul, [linear.matmul], builder.nodes, linear.matmul.outputs,
            builder.nodes[-1].outputs,
        )  # fmt: skip


def packed_width(shape: NBitsShape) -> int:
    """Bytes of a row of codes."""
    if shape.bits == 8:
        return shape.cols
    span = span_of(shape.bits, shape.group)
    return -(-shape.cols // span) * span * shape.bits // 8


def _packed(shape: NBitsShape, block: Quantized) -> Spans:
    """A block of rows, its scales repeated where a group was split."""
    groups = shape.cols // (shape.group or shape.cols)
    scales = np.repeat(block.scales, groups // block.scales.shape[1], axis=1)
    zeros = None if block.zeros is None else np.repeat(block.zeros, groups // block.zeros.shape[1], axis=1)
    return pack_spans(replace(shape, rows=len(block.codes)), block.codes, scales, zeros)
