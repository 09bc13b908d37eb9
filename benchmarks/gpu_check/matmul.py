"""Products with packed weights beside PyTorch's float16 product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cpm_edge.benchmarks.gpu_check.case import Array, Call, Case, Empty, worst
from cpm_edge.benchmarks.kernels.matmul import HEAD, Format, matrices
from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.plugins.matmul_nbits.launches import matmul_plan
from cpm_edge.plugins.matmul_nbits.reference import dequantize
from cpm_edge.plugins.matmul_nbits.spans import pack_spans
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

FORMATS = (Format(4, 128), Format(4, 32), Format(4, 128, symmetric=False), Format(2, 128))
CHECKED_ROWS = 16


def cases(config: LlamaConfig, row_counts: Sequence[int]) -> Iterator[Case]:
    """Every matrix of a model in every format and number of rows."""
    for matrix, (height, width) in matrices(config).items():
        for form in HEAD if matrix == "head" else FORMATS:
            if form.group and width % form.group:
                continue
            yield from matmul_cases(matrix, height, width, form, row_counts)


def matmul_cases(
    matrix: str, height: int, width: int, form: Format, row_counts: Sequence[int]
) -> Iterator[Case]:
    """One matrix (height, width) with random codes."""
    shape = NBitsShape(height, width, form.bits, form.group, form.symmetric)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3 if form.bits == 2 else 1 << form.bits, (height, width), np.uint8)
    scales = rng.uniform(0.5, 1.5, (height, shape.groups)).astype(np.float16)
    zeros = None if form.symmetric else rng.integers(4, 12, scales.shape).astype(np.uint8)
    packed = pack_spans(shape, codes, scales, zeros)
    weight = dequantize(shape, codes, scales, zeros)
    inputs: list[Array] = [packed.codes, packed.scales]
    inputs += [] if packed.zeros is None else [packed.zeros]
    for rows in row_counts:
        x = rng.standard_normal((rows, width)).astype(np.float16)
        yield Case(
            op="matmul",
            name=f"{matrix} {height} x {width}, {form.label}",
            rows=rows,
            plan=matmul_plan(shape),
            inputs=[x, *inputs],
            outputs=[Empty((rows, height), torch.float16)],
            error=_Error(x, weight),
            bytes=sum(each.nbytes for each in inputs) + 2 * rows * (height + width),
            operations=2 * rows * height * width,
            peer="float16 matmul",
            make_peer=_Peer(x, weight),
        )


class _Error:
    """Against float64, for some rows of x: half a unit of float16, and float32 sums."""

    def __init__(self, x: Array, weight: Array) -> None:
        self._x, self._weight = x, weight

    def __call__(self, outputs: Sequence[Array]) -> float:
        rows = np.linspace(0, len(self._x) - 1, min(CHECKED_ROWS, len(self._x)), dtype=int)
        x = self._x[rows].astype(np.float64)
        expected = x @ self._weight.T.astype(np.float64)
        products = np.abs(x) @ np.abs(self._weight.T).astype(np.float64)
        bound = 2.0**-11 * np.abs(expected) + x.shape[1] * 2.0**-24 * products + 2.0**-24
        return worst(outputs[0][rows], expected, bound)


class _Peer:
    def __init__(self, x: Array, weight: Array) -> None:
        self._x, self._weight = x, weight

    def __call__(self, device: torch.device) -> Call:
        x = torch.from_numpy(self._x).to(device)
        weight = torch.from_numpy(self._weight).to(device, torch.float16)
        return lambda: torch.nn.functional.linear(x, weight)
