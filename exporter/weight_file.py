"""The file that weights are streamed into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpm_edge.exporter.disk import disk_errors

ALIGNMENT = 4096  # a page, so that engines can map the data


@dataclass(frozen=True)
class Region:
    """Where data lies in a weight file, in bytes."""

    offset: int
    length: int


class WeightFile:
    """Appends page-aligned tensors to one file.

    Args:
        path: created, or continued where ``append`` is set.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self.path = path
        self._append = append
        self._file: BinaryIO | None = None
        self._offset = 0

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("ab" if self._append else "wb")
        self._offset = self._file.tell()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        with disk_errors(self.path):
            self._file.close()

    def add(self, blocks: Iterable[npt.NDArray[Any]]) -> Region:
        """Write the blocks one after another.

        Raises:
            ExportError: the disk is full or cannot be written.
        """
        assert self._file is not None
        with disk_errors(self.path):
            padding = -self._offset % ALIGNMENT
            self._file.write(b"\0" * padding)
            start = self._offset = self._offset + padding
            for block in blocks:
                self._offset += self._file.write(np.ascontiguousarray(block).data.cast("B"))
        return Region(start, self._offset - start)

    def initializer(self, name: str, region: Region, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        """A graph's value whose data lies in this file."""
        tensor = ir.ExternalTensor(
            location=self.path.name,
            offset=region.offset,
            length=region.length,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.path.parent),
        )
        return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
