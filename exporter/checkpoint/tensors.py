"""What a checkpoint says about a tensor, and rows of it read from plain (unpacked) storage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.integers import Integers
from cpm_edge.exporter.errors import CheckpointError

FloatRows = npt.NDArray[np.float32]
RawRows = npt.NDArray[Any]

# The names are those of the safetensors format.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and storage type of one tensor; ``dtype`` is ``BF16``, ``F16``, ``F32``, ``Q4_1`` ..."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class TensorStore(Protocol):
    """The weights of one checkpoint, whatever the format of its files.

    Attributes:
        tensors: by Hugging Face name.
        packed: the format of each tensor whose integers ``integers`` gives.
        files: all that were opened.
    """

    tensors: Mapping[str, TensorInfo]
    packed: Mapping[str, str]
    files: list[Path]

    def read(self, name: str, start: int, stop: int) -> FloatRows:
        """Rows ``[start, stop)`` of axis 0 as float32, C-contiguous."""

    def read_raw(self, name: str, start: int, stop: int) -> RawRows:
        """The same rows in the storage type."""

    def integers(self, name: str) -> Integers | None:
        """The integers of one of ``packed``; None where they have no equal in a bundle."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True)
class PlainTensor:
    """Where a row-major tensor lies in its file; ``offset`` in bytes."""

    info: TensorInfo
    file: PositionalFile
    offset: int


class PlainStore:
    """Tensors stored unpacked and row-major: safetensors and PyTorch files."""

    packed: Mapping[str, str] = {}

    def __init__(self, plain: Mapping[str, PlainTensor], files: list[PositionalFile]) -> None:
        self._plain = plain
        self._files = files
        self.tensors: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in plain.items()}
        self.files = [file.path for file in files]

    def read_raw(self, name: str, start: int, stop: int) -> RawRows:
        """Rows ``[start, stop)`` in the storage type, a new array."""
        tensor = self._plain[name]
        dtype = DTYPES[tensor.info.dtype]
        row_bytes = math.prod(tensor.info.shape[1:]) * dtype.itemsize
        data = tensor.file.read(tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        shape = (stop - start, *tensor.info.shape[1:]) if tensor.info.shape else ()
        return data.view(dtype).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> FloatRows:
        """Rows ``[start, stop)`` as float32; no copy is made of data that is float32 already."""
        return self.read_raw(name, start, stop).astype(np.float32, copy=False)

    def read_columns(self, name: str, start: int, stop: int) -> RawRows:
        """Columns ``[start, stop)`` of a matrix in the storage type, a new array (rows, stop - start)."""
        tensor = self._plain[name]
        dtype = DTYPES[tensor.info.dtype]
        rows, columns = tensor.info.shape
        first = tensor.offset + start * dtype.itemsize
        runs = tensor.file.read_strided(
            first, (stop - start) * dtype.itemsize, columns * dtype.itemsize, rows
        )
        return runs.view(dtype)

    def integers(self, name: str) -> Integers | None:
        """None: nothing here is packed."""
        return None

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def row_range(info: TensorInfo, start: int, stop: int | None) -> tuple[int, int]:
    """``start`` and ``stop`` checked against axis 0; a scalar counts as one row.

    Raises:
        CheckpointError: the range does not lie inside the tensor.
    """
    rows = info.shape[0] if info.shape else 1
    end = rows if stop is None else stop
    if not 0 <= start <= end <= rows:
        raise CheckpointError(f"{info.name}: expected rows within [0, {rows}), got [{start}, {end})")
    return start, end
