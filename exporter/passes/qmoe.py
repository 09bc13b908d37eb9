"""Experts for ONNX Runtime: com.microsoft QMoE, which packs all of them and reads those that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.experts import Experts
from cpm_edge.exporter.passes.grouped_query import MICROSOFT
from cpm_edge.exporter.passes.nbits import NBitsWeights
from cpm_edge.exporter.weight_file import WeightFile
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import NBits, WeightFormat, matmulnbits

INT8_ACTIVATIONS = 4  # an accuracy level
LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16


@dataclass(frozen=True)
class _Stack:
    """The initializers of one kind of product, all experts in one tensor."""

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


def takes_experts(weights: ModelWeights, experts: Experts, accuracy_level: int) -> bool:
    """Whether QMoE computes with these weights what MatMulNBits would.

    It has no float formats and float32 arithmetic for 4 bits only.
    """
    format_ = weights.scheme(experts.w1[0]).format
    if format_.is_float or (accuracy_level != INT8_ACTIVATIONS and format_ is not WeightFormat.INT4):
        return False
    return block_size(weights, experts) >= SMALLEST_BLOCK


def block_size(weights: ModelWeights, experts: Experts) -> int:
    """The largest block that divides the groups, or without groups the columns, of all its matrices."""
    block = LARGEST_BLOCK
    for name in experts.tensors:
        scheme = weights.scheme(name)
        if scheme.format is WeightFormat.TERNARY:
            block = min(block, 128)  # as for MatMulNBits, see nbits
        while block > 1 and (scheme.group_size or weights.shapes[name][1]) % block:
            block //= 2
    return block


class QMoEWeights(NBitsWeights):
    """NBitsWeights for a graph with experts.

    Args:
        experts: the nodes to replace, each of which ``takes_experts`` accepts. Others as for NBitsWeights.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: ModelWeights,
        file: WeightFile,
        accuracy_level: int,
        progress: Callable[[int], None],
        experts: list[Experts],
    ) -> None:
        super().__init__(graph, weights, file, accuracy_level, progress)
        self._experts = experts
        self._owned = {name for each in experts for name in each.tensors}
        self._first = {next(n for n in weights.names() if n in set(e.tensors)): e for e in experts}

    def _write(self, name: str) -> None:
        """Experts are written together, where the first of them lies in the checkpoint."""
        if name not in self._owned:
            super()._write(name)
        elif name in self._first:
            self._replace(self._first[name])

    def run(self) -> None:
        super().run()
        for name in self._owned:
            del self._graph.initializers[name]

    def _replace(self, experts: Experts) -> None:
        block = block_size(self._weights, experts)
        rows, cols = self._weights.shapes[experts.w1[0]]
        fc1 = self._stack(experts, "w1+w3", list(zip(experts.w1, experts.w3, strict=True)), 2 * rows, cols)
        fc2 = self._stack(experts, "w2", [(name,) for name in experts.w2], cols, rows)
        x, logits = experts.node.inputs[:2]
        builder = Builder(self._graph)
        shape = builder.constant("experts_logits_shape", [-1, experts.spec.num_experts])
        tokens = builder.op("Reshape", [logits, shape], name=f"{experts.prefix}.logits")
        inputs = [x, tokens, fc1.codes, fc1.scales, None, fc2.codes, fc2.scales]
        if fc1.zeros is not None:
            inputs += [None, None, None, None, fc1.zeros, fc2.zeros]
        attributes: dict[str, int | float | str] = {
            "k": experts.spec.top_k,
            "normalize_routing_weights": 1,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "expert_weight_bits": self._weights.scheme(experts.w1[0]).bits,
            "block_size": block,
            "weights_prepacked": 0,
            "accuracy_level": self._accuracy_level,
        }
        builder.op("QMoE", inputs, attributes, name=experts.prefix, domain=MICROSOFT)
        node = experts.node
        ir.convenience.replace_nodes_and_values(
            self._graph, node, [node], builder.nodes, node.outputs, builder.nodes[-1].outputs
        )

    def _stack(
        self, experts: Experts, name: str, by_expert: list[tuple[str, ...]], rows: int, cols: int
    ) -> _Stack:
        """Write the matrices of all experts as one; those of one expert with their rows in turn."""
        block, name = block_size(self._weights, experts), f"{experts.prefix}.{name}"
        bits = self._weights.scheme(by_expert[0][0]).bits
        scales: list[npt.NDArray[Any]] = []
        zeros: list[npt.NDArray[Any]] = []

        def codes() -> Iterator[npt.NDArray[np.uint8]]:
            for tensors in by_expert:
                for blocks in zip(*(self._weights.quantized(tensor) for tensor in tensors), strict=True):
                    packed = [matmulnbits(quantized, block) for quantized in blocks]
                    scales.append(_in_turn(packed, "scales"))
                    if packed[0].zero_points is not None:
                        zeros.append(_in_turn(packed, "zero_points"))
                    yield _in_turn(packed, "B")

        first = by_expert[0][0]
        count, blocks = experts.spec.num_experts, cols // block
        uint8, float32 = ir.DataType.UINT8, ir.DataType.FLOAT
        region = self._add(first, codes())
        stored = self._file.initializer(f"{name}.codes", region, uint8, [count, rows, cols * bits // 8])
        region = self._add(first, scales)
        scale = self._file.initializer(f"{name}.scales", region, float32, [count, rows, blocks])
        zero = None
        if zeros:
            region = self._add(first, zeros)
            zero = self._file.initializer(f"{name}.zeros", region, uint8, [count, rows, -(-blocks // 2)])
        for value in (stored, scale, zero):
            if value is not None:
                self._register(value)
        return _Stack(stored, scale, zero)


def _in_turn(packed: list[NBits], part: str) -> npt.NDArray[Any]:
    """Rows of several matrices, one of each in turn."""
    rows = len(packed[0].B)
    return np.stack([getattr(each, part).reshape(rows, -1) for each in packed], axis=1)
