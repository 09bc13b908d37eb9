"""Data of the native flavour: packed panels for the fused products, the stock form for all else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.passes.native_ops import NativePlan
from cpm_edge.exporter.passes.openvino_weights import OpenVinoWeights
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins.matmul_nbits.panels import pack_rows
from cpm_edge.quant.widen import widen


class NativeWeights(OpenVinoWeights):
    """OpenVinoWeights whose linear tensors are panels.

    Args:
        model: the fused model; its panel parameters are placeholders already.
        weights: every tensor of the checkpoint that the model reads.
        plan: which panels there are.
    """

    def __init__(self, model: Any, weights: ModelWeights, plan: NativePlan) -> None:
        super().__init__(model, weights)
        self._plan = plan
        self.placeholders.update(plan.panels)
        self._first = {tensors[0]: name for name, tensors in plan.panels.items()}

    def data(self, name: str) -> Iterator[tuple[str, Iterator[npt.NDArray[Any]]]]:
        """As OpenVinoWeights; fused tensors come with the first of them."""
        if any(placeholder.startswith(name) for placeholder in self.placeholders - set(self._plan.panels)):
            yield from super().data(name)
        if name in self._first:
            panels = self._first[name]
            yield panels, self._packed(self._plan.panels[panels])

    def _packed(self, tensors: list[str]) -> Iterator[npt.NDArray[Any]]:
        for tensor in tensors:
            for block in self.weights.quantized(tensor):
                shape = replace(self._plan.shapes[tensor], rows=len(block.codes))
                scales = np.repeat(block.scales, shape.groups // block.scales.shape[1], axis=1)
                codes, zeros = widen(block, shape.bits, shape.symmetric)
                if zeros is not None:
                    zeros = np.repeat(zeros, shape.groups // zeros.shape[1], axis=1)
                yield pack_rows(shape, codes, scales, zeros)
