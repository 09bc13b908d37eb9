"""Integers that a checkpoint brings and a bundle takes unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.ahead import run_ahead
from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.integers import Order
from cpm_edge.quant import GROUP_SIZES, Quantized, Scheme, WeightFormat
from cpm_edge.quant.qat import BITS_OF, find_grid, on_grid, quantize_grid

BLOCK_CODES = 1 << 22  # 2 MiB of int4
GRID_ELEMENTS = 1 << 18  # the search for a grid takes several float64 of each
SAMPLED_ROWS = 8
ROW_MULTIPLE = 64  # of Marlin's tiles, and of everything that other formats and targets want
Job = tuple[int, Callable[[], Quantized]]
Result = TypeVar("Result")

REST = Scheme(WeightFormat.INT8)
"""Linear layers that the checkpoint keeps in floats, because they are sensitive: a scale a row."""


class Taken(Protocol):
    """Where the integers of a checkpoint's matrices come from."""

    def scheme(self, name: str) -> Scheme | None:
        """How the integers of a matrix are stored; None if it brings none.

        Raises:
            CheckpointError: they are damaged.
        """

    def column_order(self, name: str) -> Order | None:
        """The matrix column of each column of the blocks; None: in their places."""

    def jobs(self, name: str, scheme: Scheme) -> Iterator[Job]:
        """(first row, function that makes the block) of a matrix in order; it is stored in ``scheme``."""


@dataclass
class StoredIntegers:
    """GPTQ, AWQ, Marlin and GGUF blocks: the checkpoint holds integers.

    Args:
        checkpoint: opened.
        leave: tensors not to take, because another format was asked for them.
    """

    checkpoint: Checkpoint
    leave: frozenset[str] = frozenset()
    _orders: dict[str, Order | None] = field(default_factory=dict)

    def scheme(self, name: str) -> Scheme | None:
        if name in self.leave or name not in self.checkpoint.packed:
            return None
        integers = self.checkpoint.integers(name)
        if integers is None:
            return None
        self._orders[name] = integers.column_order
        return integers.scheme

    def column_order(self, name: str) -> Order | None:
        if name not in self._orders:
            self.scheme(name)
        return self._orders[name]

    def jobs(self, name: str, scheme: Scheme) -> Iterator[Job]:
        integers = self.checkpoint.integers(name)
        assert integers is not None
        rows, cols = self.checkpoint.tensors[name].shape
        step = max(BLOCK_CODES // cols & -ROW_MULTIPLE, ROW_MULTIPLE)
        for start in range(0, rows, step):
            yield start, integers.block(start, min(start + step, rows))


@dataclass
class GridIntegers:
    """Quantization-aware training: the checkpoint holds floats that lie on a grid of int4 (``quant.qat``).

    Args:
        checkpoint: opened.
        leave: tensors not to take, because another format was asked for them.
    """

    checkpoint: Checkpoint
    leave: frozenset[str] = frozenset()

    def scheme(self, name: str) -> Scheme | None:
        """By the largest groups that fit every row; None when none of some sampled rows lies on a grid.

        Raises:
            CheckpointError: some rows do, and others do not.
        """
        bits = None if name in self.leave else BITS_OF.get(self.checkpoint.tensors[name].dtype)
        votes = sampled_votes(self.checkpoint, name)
        if bits is None or (votes and not any(votes)):
            return None
        width, half = max(GROUP_SIZES), True
        for grid in run_ahead(name, self._blocks(name, lambda block: find_grid(block, bits))):
            width, half = min(width, grid.width), half and grid.half
        return Scheme(WeightFormat.INT4, width, wide_scales=not half)

    def column_order(self, name: str) -> Order | None:
        return None

    def jobs(self, name: str, scheme: Scheme) -> Iterator[Job]:
        bits = BITS_OF[self.checkpoint.tensors[name].dtype]
        assert scheme.group_size is not None
        size, wide = scheme.group_size, scheme.wide_scales
        return self._blocks(name, lambda block: quantize_grid(block, size, bits, wide))

    def _blocks(
        self, name: str, work: Callable[[npt.NDArray[np.float32]], Result]
    ) -> Iterator[tuple[int, Callable[[], Result]]]:
        rows, cols = self.checkpoint.tensors[name].shape
        step = max(GRID_ELEMENTS // cols & -ROW_MULTIPLE, ROW_MULTIPLE)
        for start in range(0, rows, step):
            yield start, partial(work, self.checkpoint.read(name, start, min(start + step, rows)))


def sampled_rows(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """A few rows from the middle of a matrix."""
    rows = checkpoint.tensors[name].shape[0]
    start = max(rows // 2 - SAMPLED_ROWS // 2, 0)
    return checkpoint.read(name, start, min(start + SAMPLED_ROWS, rows))


def sampled_votes(checkpoint: Checkpoint, name: str) -> list[bool]:
    """Whether each sampled row lies on a grid of int4; rows of zeros do not vote."""
    bits = BITS_OF.get(checkpoint.tensors[name].dtype)
    rows = sampled_rows(checkpoint, name)
    fits = None if bits is None else on_grid(rows, bits)
    if fits is None:
        return [False] * len(rows)
    return [bool(fit) for fit, row in zip(fits, rows, strict=True) if row.any()]
