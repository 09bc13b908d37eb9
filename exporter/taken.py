"""Integers that a checkpoint brings and a bundle takes unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.integers import Order
from cpm_edge.quant import Quantized, Scheme, WeightFormat

BLOCK_CODES = 1 << 22  # 2 MiB of int4
ROW_MULTIPLE = 64  # of Marlin's tiles, and of everything that other formats and targets want
Job = tuple[int, Callable[[], Quantized]]

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

    def jobs(self, name: str) -> Iterator[Job]:
        """(first row, function that unpacks the block) of a matrix with a scheme, in order."""


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

    def jobs(self, name: str) -> Iterator[Job]:
        integers = self.checkpoint.integers(name)
        assert integers is not None
        rows, cols = self.checkpoint.tensors[name].shape
        step = max(BLOCK_CODES // cols & -ROW_MULTIPLE, ROW_MULTIPLE)
        for start in range(0, rows, step):
            yield start, integers.block(start, min(start + step, rows))
