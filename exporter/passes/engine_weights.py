"""Weights of an engine's graph: written once, read by products, or on the host by the embedding's lookup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.weight_file import Region, WeightFile
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Scheme, WeightFormat, onnx_int4, openvino_i8

_FLOAT = {WeightFormat.FP32: ir.DataType.FLOAT, WeightFormat.FP16: ir.DataType.FLOAT16}
# Columns that share a scale in a blocked DequantizeLinear; larger groups are split.
BLOCKS = (128, 64, 32)


class EngineWeights:
    """Writes the tensors that a graph reads. This class has the stock form of integers: DequantizeLinear.

    Args:
        graph: traced graph; changed in place.
        weights: what the graph needs.
        file: open weight file, beside the model.
        progress: called with the number of weight elements done.

    Attributes:
        half: the values that are float16 now.
        regions: where codes and scales of integer tensors lie, by name.
        byte_format: of int8 codes in the file.
    """

    byte_format = "int8"

    def __init__(
        self, graph: ir.Graph, weights: ModelWeights, file: WeightFile, progress: Callable[[int], None]
    ) -> None:
        self.graph = graph
        self.weights = weights
        self.file = file
        self.half: set[ir.Value] = set()
        self.regions: dict[str, tuple[Region, Region]] = {}
        self._progress = progress

    def run(self) -> None:
        """Write every tensor that a node reads and put its stored form in its place.

        Raises:
            ExportError: a format that the engine does not take, or a disk error.
        """
        for name in self.weights.names():
            value = self.graph.initializers[name]
            if value.uses():
                scheme = self.weights.scheme(name)
                if scheme.format.is_float:
                    self._write_float(name, value, scheme)
                else:
                    refuse_wide_scales(name, scheme)
                    self.write_integers(name, value, scheme)
                self._progress(self.weights.elements(name))

    def write_integers(self, name: str, value: ir.Value, scheme: Scheme) -> None:
        """Codes (N, K) and float16 scales, and a DequantizeLinear whose result takes the weight's place."""
        rows, cols = self.weights.shapes[name]
        block = self._block(name, scheme, cols)
        scales: list[npt.NDArray[np.float16]] = []

        def codes() -> Iterable[npt.NDArray[Any]]:
            for quantized in self.weights.quantized(name):
                groups = quantized.scales.shape[1]
                repeat = 1 if block is None else cols // block // groups
                scales.append(np.repeat(quantized.scales, repeat, axis=1).astype(np.float16))
                yield openvino_i8(quantized) if scheme.format is WeightFormat.INT8 else onnx_int4(quantized)

        dtype = ir.DataType.INT8 if scheme.format is WeightFormat.INT8 else ir.DataType.INT4
        code = self.stored(f"{name}.codes", name, codes(), dtype, [rows, cols])
        shape = [rows] if block is None else [rows, cols // block]
        scale = self.stored(f"{name}.scales", name, scales, ir.DataType.FLOAT16, shape)
        attributes = {"axis": 0} if block is None else {"axis": 1, "block_size": block}
        builder = Builder(self.graph)
        layer = name.removesuffix(".weight")
        whole = builder.op("DequantizeLinear", [code, scale], attributes, name=f"{layer}.dequantized")
        self.replace(value, builder, whole)

    def _block(self, name: str, scheme: Scheme, cols: int) -> int | None:
        """Columns of a block; None for one int8 scale a row."""
        if not scheme.symmetric:
            raise ExportError(
                f"tensor {name} is {scheme.describe()}: zero points need the plugin CpmMatMulNBits, since "
                "TensorRT dequantizes int4 without them",
                hint="--target jetson --flavour native, or --weight-format int4 --sym, which rounds anew",
            )
        if scheme.format is WeightFormat.INT8:
            if scheme.group_size not in (None, cols):
                raise ExportError(
                    f"tensor {name} is {scheme.describe()}: TensorRT dequantizes int8 with one scale a row",
                    hint="--weight-format int8 rounds anew to a scale a row, --weight-format int4 to groups",
                )
            return None
        width = scheme.group_size or cols
        block = next((size for size in BLOCKS if width % size == 0), None)
        if block is None:
            raise ExportError(
                f"tensor {name} is {scheme.describe()} with {cols} columns: expected groups of a multiple of "
                f"{min(BLOCKS)} columns",
                hint="--weight-format int8 has one scale a row and takes any number of columns",
            )
        return block

    def stored(
        self, part: str, name: str, blocks: Iterable[npt.NDArray[Any]], dtype: ir.DataType, shape: list[int]
    ) -> ir.Value:
        """Write a part of a tensor, count its bytes and make it an initializer."""
        region = self.file.add(blocks)
        self.weights.count_bytes(name, region)
        value = self.file.initializer(part, region, dtype, shape)
        self.graph.register_initializer(value)
        if part.endswith((".codes", ".scales")):
            first, _ = self.regions.get(name, (region, region))
            self.regions[name] = first, region
        return value

    def replace(self, value: ir.Value, builder: Builder, whole: ir.Value) -> None:
        """Let everything that read the tensor read float16 ``whole``."""
        users = list(value.uses())
        builder.insert_first()
        for node, index in users:
            node.replace_input_with(index, whole)
        self.graph.initializers.pop(value.name or "")
        self.half.add(whole)

    def _write_float(self, name: str, value: ir.Value, scheme: Scheme) -> None:
        dtype = _FLOAT.get(scheme.format)
        if dtype is None:
            raise ExportError(
                f"tensor {name}: expected fp16, got {scheme.describe()}", hint="--weight-format fp16"
            )
        region = self.file.add(self.weights.stored(name))
        self.weights.count_bytes(name, region)
        tensor = self.file.initializer(name, region, dtype, list(self.weights.shapes[name]))
        value.const_value, value.type = tensor.const_value, tensor.type
        if dtype is ir.DataType.FLOAT16:
            self.half.add(value)


def refuse_wide_scales(name: str, scheme: Scheme) -> None:
    """Raises ExportError for scales that float16 does not hold."""
    if scheme.wide_scales:
        raise ExportError(
            f"tensor {name} is {scheme.describe()}: expected scales that float16 holds exactly",
            hint="--weight-format int4 rounds anew",
        )
