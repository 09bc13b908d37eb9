"""Rows of GGUF tensors, dequantized block by block, in Hugging Face order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.gguf_header import GgufTensor
from cpm_edge.exporter.checkpoint.gguf_integers import UNPACKED_INTEGERS, find_integers
from cpm_edge.exporter.checkpoint.gguf_names import permuted_heads, stored_rows
from cpm_edge.exporter.checkpoint.integers import Integers
from cpm_edge.exporter.checkpoint.tensors import DTYPES, FloatRows, RawRows, TensorInfo
from cpm_edge.exporter.errors import CheckpointError

UNPACKED = {
    GGMLQuantizationType.F32: DTYPES["F32"],
    GGMLQuantizationType.F16: DTYPES["F16"],
    GGMLQuantizationType.BF16: DTYPES["BF16"],
}


class GgufStore:
    """The weights of one GGUF file under Hugging Face names."""

    def __init__(
        self,
        file: PositionalFile,
        tensors: Mapping[str, GgufTensor],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        """
        Args:
            tensors: Hugging Face name to the tensor in the file.
            heads: query heads, kv_heads: key heads, head_dim: their size; for the order of their rows.

        Raises:
            CheckpointError: a type that cannot be dequantized, or q/k rows that are not heads * head_dim.
        """
        self._file = file
        self._stored = tensors
        self._head_dim = head_dim
        self._permuted = set()
        for name, tensor in tensors.items():
            if (count := permuted_heads(name, heads, kv_heads)) is not None:
                _check_heads(tensor, count, head_dim)
                self._permuted.add(name)
        _check_types(tensors.values())
        self.files = [file.path]
        self.packed: Mapping[str, str] = {
            name: tensor.type.name
            for name, tensor in tensors.items()
            if tensor.type in UNPACKED_INTEGERS and len(tensor.shape) == 2
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.shape, tensor.type.name) for name, tensor in tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> FloatRows:
        """Rows ``[start, stop)`` as float32."""
        tensor = self._stored[name]
        if start == stop:
            return np.empty((0, *tensor.shape[1:]), dtype=np.float32)
        rows = dequantize(self._bytes(name, start, stop), tensor.type)
        return np.ascontiguousarray(self._finish(name, rows, start, stop), dtype=np.float32)

    def read_raw(self, name: str, start: int, stop: int) -> RawRows:
        """Rows ``[start, stop)`` of an unpacked tensor.

        Raises:
            CheckpointError: the tensor is block-quantized; its blocks are no rows of numbers.
        """
        tensor = self._stored[name]
        dtype = UNPACKED.get(tensor.type)
        if dtype is None:
            raise CheckpointError(f"{name} is stored as {tensor.type.name} blocks and has no raw rows")
        rows = self._bytes(name, start, stop).view(dtype)
        return np.ascontiguousarray(self._finish(name, rows, start, stop))

    def integers(self, name: str) -> Integers | None:
        """The integers of a matrix in blocks that have an equal in a bundle; None if these have none."""
        tensor = self._stored[name]
        return find_integers(name, tensor.type, tensor.shape[0], partial(self._bytes, name))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _bytes(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The stored blocks of the rows, one row of bytes each; a vector is one row, whole."""
        tensor = self._stored[name]
        size = tensor.row_bytes
        if len(tensor.shape) == 1:
            return self._file.read(tensor.offset, size).reshape(1, size)
        if name not in self._permuted or start == stop:
            return self._file.read(tensor.offset + start * size, (stop - start) * size).reshape(-1, size)
        order = stored_rows(np.arange(start, stop), self._head_dim)
        first, last = int(order.min()), int(order.max()) + 1
        block = self._file.read(tensor.offset + first * size, (last - first) * size).reshape(-1, size)
        return block[order - first]

    def _finish(self, name: str, rows: RawRows, start: int, stop: int) -> RawRows:
        shape = self._stored[name].shape
        if len(shape) > 1:
            return rows.reshape(stop - start, *shape[1:])
        order = np.arange(start, stop)
        result: RawRows = rows.reshape(-1)[
            stored_rows(order, self._head_dim) if name in self._permuted else order
        ]
        return result


def _check_heads(tensor: GgufTensor, heads: int, head_dim: int) -> None:
    if tensor.shape[0] != heads * head_dim or head_dim % 2:
        raise CheckpointError(
            f"the GGUF tensor {tensor.name}: expected {heads} heads of {head_dim} rows, got {tensor.shape[0]}"
        )


def _check_types(tensors: Iterable[GgufTensor]) -> None:
    checked: set[GGMLQuantizationType] = set()
    for tensor in tensors:
        if tensor.type in checked:
            continue
        block = np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), dtype=np.uint8)
        try:
            dequantize(block, tensor.type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"the GGUF tensor {tensor.name} is of type {tensor.type.name}, which cannot be dequantized",
                hint="use a file of another quantization, Q8_0 or F16 for the best result",
            ) from error
        checked.add(tensor.type)
