"""One matrix of a GPTQ, AWQ or Marlin checkpoint, found in the tensors that it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.checkpoint.integers import Order
from cpm_edge.exporter.checkpoint.quantization import Quantization
from cpm_edge.exporter.checkpoint.tensors import PlainStore, TensorInfo
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.quant import QuantError, Quantized, Scheme, WeightFormat
from cpm_edge.quant.awq_format import unpack_awq
from cpm_edge.quant.gptq_format import column_order, unpack_gptq, unpack_gptq_zeros
from cpm_edge.quant.marlin_format import TILE_COLS, TILE_ROWS, unpack_marlin, unpermute_marlin_scales
from cpm_edge.quant.packed import NIBBLES, check_scales, stored_groups

ZERO = 8  # zero point of symmetric int4
SCALE_TYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Layout:
    """How codes lie in 32-bit words.

    Attributes:
        name: in messages.
        cols: matrix columns in a row of words.
        rows: matrix rows that begin a word, or a tile of them; blocks are read in multiples of it.
        words: words for each ``rows``, along the second axis.
        unpack: codes (rows, cols) of words.
    """

    name: str
    cols: int
    rows: int
    words: int
    unpack: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.uint8]]


GPTQ = Layout("GPTQ", NIBBLES, 1, 1, unpack_gptq)
AWQ = Layout("AWQ", 1, NIBBLES, 1, unpack_awq)
MARLIN = Layout("MARLIN", TILE_COLS, TILE_ROWS, 2 * TILE_ROWS, unpack_marlin)


@dataclass(frozen=True)
class PackedParts:
    """Where one matrix is stored: its tensors, looked at from the outside.

    Attributes:
        layout: told by the shapes, which no two layouts share.
        shape: rows and columns of the matrix.
        groups: scales in a row.
        codes, scales, zeros, g_idx: names of the tensors; the last two may be absent.
    """

    layout: Layout
    shape: tuple[int, int]
    groups: int
    codes: str
    scales: str
    zeros: str | None
    g_idx: str | None


def find_parts(codes: str, tensors: Mapping[str, TensorInfo], quantization: Quantization) -> PackedParts:
    """Check the names, types and shapes of a matrix whose codes are the tensor ``codes``; nothing is read.

    Raises:
        CheckpointError: a part is missing, or of another type or shape than the codes ask for.
    """
    module, _, ending = codes.rpartition(".")
    scales = f"{module}.{'s' if ending == 'B' else 'scales'}"
    _expect(tensors, codes, ("I32",), 2)
    _expect(tensors, scales, SCALE_TYPES, 2)
    groups, rows = tensors[scales].shape
    words = tensors[codes].shape
    layout = _layout(codes, words, rows, quantization)
    shape = (rows, words[0] * layout.cols)
    # First: what codes and scales say decides whether the other parts fit, so the damaged one is named.
    _check_groups(codes, scales, groups, shape[1], quantization)
    zeros, g_idx = f"{module}.qzeros", f"{module}.g_idx"
    has_zeros = layout is not MARLIN
    if has_zeros:
        _expect(tensors, zeros, ("I32",), 2, (groups, rows // NIBBLES))
    has_order = layout is GPTQ and g_idx in tensors
    if has_order:
        _expect(tensors, g_idx, ("I32", "I64"), 1, (shape[1],))
    return PackedParts(
        layout, shape, groups, codes, scales, zeros if has_zeros else None, g_idx if has_order else None
    )


def _layout(codes: str, words: tuple[int, ...], rows: int, quantization: Quantization) -> Layout:
    own = GPTQ if quantization.method == "gptq" else AWQ
    for layout in (own, MARLIN):
        if words[1] * layout.rows == rows * layout.words and rows % layout.rows == 0 and rows % NIBBLES == 0:
            return layout
    expected = f"[{'columns / 8' if own is GPTQ else 'columns'}, {rows if own is GPTQ else f'{rows} / 8'}]"
    raise CheckpointError(
        f"tensor {codes}: expected {expected} for {rows} rows of {own.name} with 4 bits (the scales say how "
        f"many), got {list(words)}"
    )


def _check_groups(codes: str, scales: str, groups: int, cols: int, quantization: Quantization) -> None:
    allowed = {cols if size == -1 else size for size in quantization.group_sizes}
    if groups and cols % groups == 0 and cols // groups in allowed:
        return
    size = max(allowed)
    if cols % size:
        raise CheckpointError(
            f"tensor {codes}: expected a multiple of {size} columns (the group size), got {cols}"
        )
    raise CheckpointError(
        f"tensor {scales}: expected {cols // size} groups ({cols} columns, group size {size}), got {groups}"
    )


def _expect(
    tensors: Mapping[str, TensorInfo],
    name: str,
    dtypes: tuple[str, ...],
    axes: int,
    shape: tuple[int, ...] | None = None,
) -> None:
    info = tensors.get(name)
    if info is None:
        raise CheckpointError(f"tensor {name}: not in the checkpoint, whose other parts are there")
    if info.dtype not in dtypes:
        raise CheckpointError(f"tensor {name}: expected {' or '.join(dtypes)}, got {info.dtype}")
    if len(info.shape) != axes or (shape is not None and info.shape != shape):
        expected = f"shape {list(shape)}" if shape else f"{axes} axes"
        raise CheckpointError(f"tensor {name}: expected {expected}, got {list(info.shape)}")


class PackedTensor:
    """The integers of one matrix (see ``Integers``); its scales and zero points are in memory.

    Args:
        plain: the stored tensors.
        parts: where the matrix is.
        quantization: what config.json says.

    Raises:
        CheckpointError: a scale, zero point or group index that cannot be, with its tensor.
    """

    def __init__(self, plain: PlainStore, parts: PackedParts, quantization: Quantization) -> None:
        self._plain = plain
        self._parts = parts
        cols = parts.shape[1]
        with _naming(parts.scales):
            groups = stored_groups(cols, parts.groups)
            scales = self._whole(parts.scales)
            if parts.layout is MARLIN:
                scales = unpermute_marlin_scales(scales)
            self._scales = np.repeat(scales.astype(np.float32).T, groups.repeat, axis=1)
            half = check_scales(self._scales)
        zeros = np.repeat(self._read_zeros(quantization), groups.repeat, axis=1)
        symmetric = bool((zeros == ZERO).all())
        self._zeros = None if symmetric else zeros
        self.column_order = self._read_order()
        self.scheme = Scheme(WeightFormat.INT4, groups.width, symmetric, wide_scales=not half)

    def block(self, start: int, stop: int) -> Callable[[], Quantized]:
        layout, rows = self._parts.layout, self._parts.shape[0]
        first, last = start // layout.rows, -(-stop // layout.rows)
        words = self._plain.read_columns(self._parts.codes, first * layout.words, last * layout.words)
        scales = self._scales[start:stop]
        zeros = None if self._zeros is None else self._zeros[start:stop]
        assert last * layout.rows <= rows

        def unpack() -> Quantized:
            codes = layout.unpack(words)[start - first * layout.rows :][: stop - start]
            if self.column_order is not None:
                codes = np.take(codes, self.column_order, axis=1)
            return Quantized(codes, scales, zeros, self.scheme)

        return unpack

    def _whole(self, name: str) -> npt.NDArray[Any]:
        return self._plain.read_raw(name, 0, self._plain.tensors[name].shape[0])

    def _read_zeros(self, quantization: Quantization) -> npt.NDArray[np.uint8]:
        """Zero points (rows, groups)."""
        parts = self._parts
        if parts.zeros is None:
            return np.full((parts.shape[0], parts.groups), ZERO, np.uint8)
        with _naming(parts.zeros):
            words = self._whole(parts.zeros)
            if parts.layout is AWQ:
                return unpack_awq(words)
            zeros = unpack_gptq_zeros(words, less_one=quantization.less_one)
        if quantization.symmetric and (other := zeros != ZERO).any():
            row, group = (int(index) for index in np.argwhere(other)[0])
            stored = "gptq_v2" if quantization.less_one else "gptq"
            raise CheckpointError(
                f"tensor {parts.zeros}: expected the zero point 8 everywhere (config.json says sym), got "
                f"{zeros[row, group]} in row {row}, group {group}",
                hint=f'if all are equal, the checkpoint_format is "{stored}"; else "sym" is false',
            )
        return zeros

    def _read_order(self) -> Order | None:
        if self._parts.g_idx is None:
            return None
        with _naming(self._parts.g_idx):
            return column_order(self._whole(self._parts.g_idx), self._parts.groups)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the tensor's name into a QuantError."""
    try:
        yield
    except QuantError as error:
        raise CheckpointError(f"tensor {name}: {error.message}", hint=error.hint) from error
