"""Data of the native flavour: packed weights for the fused products, the stock form for all else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.passes.native_latent import UP, up_projection
from cpm_edge.exporter.passes.native_plan import PANELS, SLICES, STRIPS, NativePlan
from cpm_edge.exporter.passes.openvino_weights import OpenVinoWeights
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins.matmul_nbits.panels import pack_rows
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.sparse_mlp.layouts import pack_slices, pack_strips
from cpm_edge.plugins.sparse_mlp.spec import SLICE_ROWS
from cpm_edge.quant import Quantized
from cpm_edge.quant.widen import widen

# Codes (rows, columns), scales and zero points (rows, groups) as the kernels take them.
_Block = tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8] | None]

_PACK = {PANELS: pack_rows, STRIPS: pack_strips, SLICES: pack_slices}


class NativeWeights(OpenVinoWeights):
    """OpenVinoWeights whose linear tensors are packed for the kernels.

    Args:
        model: the fused model; its parameters of packed weights are placeholders already.
        weights: every tensor of the checkpoint that the model reads.
        plan: which packed weights there are.
    """

    def __init__(self, model: Any, weights: ModelWeights, plan: NativePlan) -> None:
        super().__init__(model, weights)
        self._plan = plan
        self.placeholders.update(plan.panels, plan.ups)
        self._first = {tensors[0]: name for name, tensors in plan.panels.items()}

    def data(self, name: str) -> Iterator[tuple[str, Iterator[npt.NDArray[Any]]]]:
        """As OpenVinoWeights; fused tensors come with the first of them."""
        own = set(self._plan.panels).union(self._plan.ups)
        if any(placeholder.startswith(name) for placeholder in self.placeholders - own):
            yield from super().data(name)
        if name + UP in self._plan.ups:
            yield name + UP, iter([up_projection(self.weights.quantized(name)).packed()])
        if name in self._first:
            yield self._first[name], self._packed(self._first[name])

    def _packed(self, name: str) -> Iterator[npt.NDArray[Any]]:
        ending = name[name.rindex(".") :]
        pack = _PACK[ending]
        for tensor in self._plan.panels[name]:
            shape = self._plan.shapes[tensor]
            blocks = (_unified(block, shape) for block in self.weights.quantized(tensor))
            for codes, scales, zeros in _whole_slices(blocks) if ending == SLICES else blocks:
                yield pack(replace(shape, rows=len(codes)), codes, scales, zeros)


def _unified(block: Quantized, shape: NBitsShape) -> _Block:
    """A block in the groups and bits that its op has for all its tensors."""
    scales = np.repeat(block.scales, shape.groups // block.scales.shape[1], axis=1)
    codes, zeros = widen(block, shape.bits, shape.symmetric)
    if zeros is not None:
        zeros = np.repeat(zeros, shape.groups // zeros.shape[1], axis=1)
    return codes, scales, zeros


def _whole_slices(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """The same rows in blocks of whole slices, but for the last."""
    rest: _Block | None = None
    for block in blocks:
        if rest is not None:
            block = _joined(rest, block)
        whole = len(block[0]) // SLICE_ROWS * SLICE_ROWS
        if whole:
            yield _rows(block, slice(None, whole))
        rest = _rows(block, slice(whole, None))
    if rest is not None and len(rest[0]):
        yield rest


def _joined(first: _Block, second: _Block) -> _Block:
    codes, scales = (np.concatenate(pair) for pair in zip(first[:2], second[:2], strict=True))
    if first[2] is None or second[2] is None:
        return codes, scales, None
    return codes, scales, np.concatenate([first[2], second[2]])


def _rows(block: _Block, rows: slice) -> _Block:
    codes, scales, zeros = block
    return codes[rows], scales[rows], None if zeros is None else zeros[rows]
