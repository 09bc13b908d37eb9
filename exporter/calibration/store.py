"""A checkpoint whose linear layers are the integers that calibration made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cpm_edge.exporter.calibration.matrices import LayerFile
from cpm_edge.exporter.checkpoint import Checkpoint, TensorInfo
from cpm_edge.exporter.checkpoint.integers import Order, dequantized
from cpm_edge.exporter.checkpoint.tensors import FloatRows, RawRows
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.quant import Quantized, Scheme

CODES = "I4"


class CalibratedStore:
    """The tensors of ``base`` with the results of its layers (see ``TensorStore``).

    Args:
        base: the checkpoint that was calibrated; it stays open as long as this store is used.
        layers: the results of every layer.
        method: what their integers are said to come from.
        kept: matrices that stay floats, because they are sensitive: their integers are not used.
    """

    def __init__(
        self, base: Checkpoint, layers: list[LayerFile], method: str, kept: frozenset[str] = frozenset()
    ) -> None:
        self._base = base
        self._layers = {name: layer for layer in layers for name in layer.schemes if name not in kept}
        self._factors = {
            name: layer.factors
            for layer in layers
            for name in (*layer.factors.rows, *layer.factors.columns)
            if name not in self._layers
        }
        self.packed: Mapping[str, str] = dict.fromkeys(self._layers, method)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, info.shape, CODES if name in self._layers else info.dtype)
            for name, info in base.tensors.items()
        }
        self.files: list[Any] = []
        self._last: tuple[str, _Matrix] | None = None

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Of the matrices that are int4, by tensor name."""
        return {name: layer.schemes[name] for name, layer in self._layers.items()}

    @property
    def scaled(self) -> frozenset[str]:
        """Float tensors whose values are not those of the checkpoint."""
        return frozenset(self._factors)

    def integers(self, name: str) -> _Matrix:
        """The integers of a matrix; those of the last one asked for are kept."""
        if self._last is None or self._last[0] != name:
            self._last = (name, _Matrix(self._layers[name].read(name)))
        return self._last[1]

    def read(self, name: str, start: int, stop: int) -> FloatRows:
        """Rows ``[start, stop)`` as float32."""
        if name in self._layers:
            return dequantized(self.integers(name), start, stop)
        rows = self._base.read(name, start, stop)
        return self._factors[name].scaled(name, rows, start) if name in self._factors else rows

    def read_raw(self, name: str, start: int, stop: int) -> RawRows:
        """Rows ``[start, stop)`` of a tensor that calibration left as it is.

        Raises:
            CheckpointError: it did not.
        """
        if name in self._layers or name in self._factors:
            raise CheckpointError(f"{name} was calibrated and has no rows of its stored type")
        return self._base.read_raw(name, start, stop)

    def close(self) -> None:
        """Nothing: the files are opened for every read, and ``base`` is its owner's."""


class _Matrix:
    """Integers in memory (see ``Integers``)."""

    column_order: Order | None = None

    def __init__(self, matrix: Quantized) -> None:
        self._matrix = matrix

    @property
    def scheme(self) -> Scheme:
        return self._matrix.scheme

    def block(self, start: int, stop: int) -> Callable[[], Quantized]:
        whole = self._matrix
        zeros = None if whole.zeros is None else whole.zeros[start:stop]
        part = Quantized(whole.codes[start:stop], whole.scales[start:stop], zeros, whole.scheme)
        return lambda: part
