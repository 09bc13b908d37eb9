"""Weights of a graph for ONNX Runtime: MatMulNBits for integers, FusedMatMul for floats, data in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.grouped_query import MICROSOFT
from cpm_edge.exporter.passes.linear import Linear, replace_linears
from cpm_edge.exporter.weight_file import Region, WeightFile
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Scheme, TensorClass, WeightFormat, matmulnbits

_FLOAT = {
    WeightFormat.FP32: ir.DataType.FLOAT,
    WeightFormat.FP16: ir.DataType.FLOAT16,
    WeightFormat.BF16: ir.DataType.BFLOAT16,
}
ZERO_INT8 = 128


@dataclass(frozen=True)
class _Packed:
    """Initializers of one quantized weight; ``rows`` is the same data as ``codes`` with shape (N, K)."""

    codes: ir.Value
    rows: ir.Value | None
    scales: ir.Value
    row_scales: ir.Value | None
    zeros: ir.Value | None
    scheme: Scheme
    block: int


class NBitsWeights:
    """Writes the weights of a graph to a file and rewrites the nodes that use them.

    Args:
        graph: traced graph; changed in place.
        weights: what the graph needs.
        file: open weight file, beside the model.
        accuracy_level: of MatMulNBits: 0 computes in fp32, 4 quantizes the activations to int8.
        progress: called with the number of weight elements done.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: ModelWeights,
        file: WeightFile,
        accuracy_level: int,
        progress: Callable[[int], None],
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._file = file
        self._accuracy_level = accuracy_level
        self._progress = progress
        self._packed: dict[str, _Packed] = {}

    def run(self) -> None:
        """Write every tensor and rewrite the nodes that read it."""
        for name in self._weights.names():
            self._write(name)
            self._progress(self._weights.elements(name))
        self._graph.opset_imports[MICROSOFT] = 1
        replace_linears(self._graph, self._linear)
        for node in list(self._graph):
            if node.op_type == "Gather" and node.inputs[0] is not None and self._is_weight(node.inputs[0]):
                self._lookup(node)
        for name in self._packed:
            self._graph.initializers.pop(name)

    def _write(self, name: str) -> None:
        scheme = self._weights.scheme(name)
        if self._weights.kind(name) is TensorClass.ABSORBED:
            self._expand(name, scheme)
        elif scheme.format.is_float:
            self._write_float(name, scheme)
        else:
            self._packed[name] = self._write_integers(name, scheme)

    def _is_weight(self, value: ir.Value) -> bool:
        return value.name in self._weights.shapes

    def _write_float(self, name: str, scheme: Scheme) -> None:
        region = self._add(name, self._weights.stored(name))
        value = self._graph.initializers[name]
        dtype = _FLOAT[scheme.format]
        stored = self._file.initializer(name, region, dtype, list(self._weights.shapes[name]))
        value.const_value, value.type = stored.const_value, stored.type

    def _write_integers(self, name: str, scheme: Scheme) -> _Packed:
        rows, cols = self._weights.shapes[name]
        block = _block_size(scheme, cols)
        scales: list[npt.NDArray[np.float32]] = []
        row_scales: list[npt.NDArray[np.float32]] = []
        zeros: list[npt.NDArray[np.uint8]] = []

        def codes() -> Iterator[npt.NDArray[np.uint8]]:
            for quantized in self._weights.quantized(name):
                packed = matmulnbits(quantized, block)
                scales.append(packed.scales)
                row_scales.append(quantized.scales)
                if packed.zero_points is not None:
                    zeros.append(packed.zero_points)
                yield packed.B

        region = self._add(name, codes())
        blocks, width = -(-cols // block), block * scheme.bits // 8
        uint8, float32 = ir.DataType.UINT8, ir.DataType.FLOAT
        whole = blocks * block == cols and scheme.bits == 8
        return _Packed(
            codes=self._file.initializer(f"{name}.codes", region, uint8, [rows, blocks, width]),
            rows=self._file.initializer(f"{name}.rows", region, uint8, [rows, cols]) if whole else None,
            scales=self._file.initializer(
                f"{name}.scales", self._add(name, scales), float32, [rows * blocks]
            ),
            row_scales=self._file.initializer(
                f"{name}.row_scales", self._add(name, row_scales), float32, [rows, 1]
            )
            if whole and scheme.group_size is None
            else None,
            zeros=self._file.initializer(
                f"{name}.zeros", self._add(name, zeros), uint8, [rows * -(-blocks // 2)]
            )
            if zeros
            else None,
            scheme=scheme,
            block=block,
        )

    def _add(self, name: str, blocks: Iterable[npt.NDArray[Any]]) -> Region:
        """Write a part of a tensor and count its bytes."""
        region = self._file.add(blocks)
        self._weights.count_bytes(name, region)
        return region

    def _register(self, value: ir.Value) -> ir.Value:
        assert value.name is not None
        if value.name not in self._graph.initializers:
            self._graph.register_initializer(value)
        return value

    def _linear(self, linear: Linear) -> list[ir.Node]:
        name = linear.weight.name or ""
        layer = name.removesuffix(".weight")
        if name not in self._packed:
            return self._float_linear(linear, layer)
        packed = self._packed[name]
        rows, cols = self._weights.shapes[name]
        inputs = [linear.x, self._register(packed.codes), self._register(packed.scales)]
        if packed.zeros is not None:
            inputs.append(self._register(packed.zeros))
        attributes = {
            "K": cols,
            "N": rows,
            "bits": packed.scheme.bits,
            "block_size": packed.block,
            "accuracy_level": self._accuracy_level,
        }
        builder = Builder(self._graph)
        builder.op("MatMulNBits", inputs, attributes, name=layer, domain=MICROSOFT)
        return builder.nodes

    def _float_linear(self, linear: Linear, layer: str) -> list[ir.Node]:
        builder = Builder(self._graph)
        weight = linear.weight
        if weight.dtype != ir.DataType.FLOAT:
            weight = builder.op("Cast", [weight], {"to": ir.DataType.FLOAT.value}, name=f"{layer}.float")
        builder.op("FusedMatMul", [linear.x, weight], {"transB": 1}, name=layer, domain=MICROSOFT)
        return builder.nodes

    def _lookup(self, node: ir.Node) -> None:
        """An embedding row: gathered in the stored type, then converted."""
        weight, ids = node.inputs[0], node.inputs[1]
        assert weight is not None and weight.name is not None
        layer = weight.name.removesuffix(".weight")
        builder = Builder(self._graph)
        to_float = {"to": ir.DataType.FLOAT.value}
        packed = self._packed.get(weight.name)
        if packed is None:
            if weight.dtype == ir.DataType.FLOAT:
                return
            rows = builder.op("Gather", [weight, ids], name=f"{layer}.stored_rows")
            builder.op("Cast", [rows], to_float, name=f"{layer}.lookup")
        else:
            if packed.rows is None or packed.row_scales is None:
                columns = self._weights.shapes[weight.name][1]
                raise ExportError(
                    f"tensor {weight.name}: int8 rows need a multiple of 16 columns, got {columns}",
                    hint="--embedding-format fp16",
                )
            codes = builder.op("Gather", [self._register(packed.rows), ids], name=f"{layer}.codes")
            scales = builder.op("Gather", [self._register(packed.row_scales), ids], name=f"{layer}.scales")
            zero = builder.constant("int8_zero", ZERO_INT8, np.float32)
            signed = builder.op(
                "Sub",
                [builder.op("Cast", [codes], to_float, name=f"{layer}.float"), zero],
                name=f"{layer}.signed",
            )
            builder.op("Mul", [signed, scales], name=f"{layer}.lookup")
        ir.convenience.replace_nodes_and_values(
            self._graph, node, [node], builder.nodes, node.outputs, builder.nodes[-1].outputs
        )

    def _expand(self, name: str, scheme: Scheme) -> None:
        """Write a matrix whose parts the graph uses and widen it, which ONNX Runtime does once, on load."""
        weight = self._graph.initializers[name]
        users = list(weight.uses())
        layer = name.removesuffix(".weight")
        builder = Builder(self._graph)
        if scheme.format.is_float:
            self._write_float(name, scheme)
            if weight.dtype == ir.DataType.FLOAT:
                return
            to_float = {"to": ir.DataType.FLOAT.value}
            whole = builder.op("Cast", [weight], to_float, name=f"{layer}.expanded")
        else:
            whole = self._dequantized(builder, name, scheme)
            self._graph.initializers.pop(name)
        builder.insert_first()
        for node, index in users:
            node.replace_input_with(index, whole)

    def _dequantized(self, builder: Builder, name: str, scheme: Scheme) -> ir.Value:
        """Write codes, one a byte, zero points and scales, and nodes that make float32 (N, K) of them."""
        rows, cols = self._weights.shapes[name]
        groups, layer = scheme.groups(cols), name.removesuffix(".weight")
        scales: list[npt.NDArray[np.float32]] = []
        zeros: list[npt.NDArray[np.uint8]] = []

        def codes() -> Iterator[npt.NDArray[np.uint8]]:
            for quantized in self._weights.quantized(name):
                scales.append(quantized.scales)
                zeros.append(quantized.zero_points())
                yield quantized.codes

        def stored(part: str, data: Iterable[npt.NDArray[Any]], dtype: ir.DataType, width: int) -> ir.Value:
            region = self._add(name, data)
            return self._register(
                self._file.initializer(f"{name}.{part}", region, dtype, [rows, groups, width])
            )

        to_float = {"to": ir.DataType.FLOAT.value}
        code = stored("codes", codes(), ir.DataType.UINT8, cols // groups)
        code = builder.op("Cast", [code], to_float, name=f"{layer}.float_codes")
        zero = stored("zeros", zeros, ir.DataType.UINT8, 1)
        zero = builder.op("Cast", [zero], to_float, name=f"{layer}.float_zeros")
        scale = stored("scales", scales, ir.DataType.FLOAT, 1)
        signed = builder.op("Sub", [code, zero], name=f"{layer}.signed")
        scaled = builder.op("Mul", [signed, scale], name=f"{layer}.scaled")
        shape = builder.constant(f"{layer}.shape", [rows, cols])
        return builder.op("Reshape", [scaled, shape], name=f"{layer}.expanded")


def _block_size(scheme: Scheme, cols: int) -> int:
    """MatMulNBits block; with one scale a row, the largest that leaves the codes unpadded.

    Bits 2 have fast kernels for 32, 64 and 128 (measured: 256 expands the weights, 200 times slower), so
    larger groups are split; their scale is repeated.
    """
    least, block = 16, scheme.group_size or 256
    if scheme.format is WeightFormat.TERNARY:
        least, block = 32, min(block, 128)
    while cols % block and block > least:
        block //= 2
    return block
