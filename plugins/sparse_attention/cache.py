"""The KV cache of ``cpm.SparseAttention``: its types, its buffers, and rows that do not come from the op.

``float16`` keeps keys and values as they are. ``int8`` keeps code * scale, the scales in float16: a key has
one for every 32 columns, because a few channels of keys are much larger than the others, and a value has one.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.native import NativeError, pointer
from cpm_edge.plugins.sparse_attention.pooling import pool_keys
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

Floats: TypeAlias = npt.NDArray[np.float32]
Halves: TypeAlias = npt.NDArray[np.float16]
Codes: TypeAlias = npt.NDArray[np.int8]

CACHE_TYPES = ("float16", "int8")
KEY_GROUP = 32
MAX_CODE = 127
_TYPE_NUMBERS = {np.dtype(np.float16): 0, np.dtype(np.int8): 1}


class CCache(ctypes.Structure):
    """cpm_cache of the C API: one layer of one sequence."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("pooled", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    )


def quantize(rows: npt.NDArray[np.floating[Any]], group: int) -> tuple[Codes, Halves]:
    """Codes (..., n) of rows (..., n) and their scales (..., ceil(n / group)).

    A scale is the group's largest magnitude / 127, rounded to float16; a code is the nearest integer to
    x * (1 / scale), ties to even. A group that holds NaN or infinity has such a scale and codes 0.
    """
    size = rows.shape[-1]
    groups = -(-size // group)
    padded = np.zeros((*rows.shape[:-1], groups * group), np.float32)
    padded[..., :size] = rows
    parts = padded.reshape(*rows.shape[:-1], groups, group)
    with np.errstate(over="ignore", divide="ignore"):
        scales = (np.abs(parts).max(-1) / np.float32(MAX_CODE)).astype(np.float16)
        steps = scales.astype(np.float32)
        factors = np.where((steps > 0) & np.isfinite(steps), np.float32(1) / steps, np.float32(0))[..., None]
    codes = np.rint(np.where(factors > 0, parts, np.float32(0)) * factors)
    codes = np.clip(codes, -MAX_CODE, MAX_CODE).astype(np.int8)
    return codes.reshape(padded.shape)[..., :size], scales


def dequantize(codes: Codes, scales: Halves, group: int) -> Floats:
    """code * scale, float32 (..., n); NaN where the scale is not finite."""
    wide = np.repeat(scales.astype(np.float32), group, -1)[..., : codes.shape[-1]]
    with np.errstate(invalid="ignore"):
        return codes * wide


@dataclass(frozen=True)
class AttentionCache:
    """The buffers of one layer, written in place.

    Attributes:
        key, value: (B, kv_num_heads, C, D) float16 or int8. Latent caches are float16 and have no value.
        pooled: (B, kv_num_heads, C / kernel_stride, D) float32, None where the spec is dense.
        key_scales: (B, kv_num_heads, C, ceil(D / 32)) float16 for int8, else None.
        value_scales: (B, kv_num_heads, C) float16 for int8, else None.
    """

    key: Halves | Codes
    value: Halves | Codes | None
    pooled: Floats | None
    key_scales: Halves | None = None
    value_scales: Halves | None = None

    @classmethod
    def empty(
        cls, spec: SparseAttentionSpec, batch: int, capacity: int, size: int, dtype: str = "float16"
    ) -> AttentionCache:
        """Zeros for ``capacity`` rows of ``size`` floats a head.

        Raises:
            ValueError: a sparse spec and a capacity that is not whole blocks, or a type that is unknown or,
                for a latent spec, not float16.
        """
        types = ("float16",) if spec.is_latent else CACHE_TYPES
        if dtype not in types:
            raise ValueError(f"cache type: expected {' or '.join(types)}, got {dtype}")
        rows = (batch, spec.kv_num_heads, capacity)
        pooled = key_scales = value_scales = None
        if not spec.is_dense:
            if capacity % spec.block_size:
                raise ValueError(f"capacity: expected a multiple of {spec.block_size}, got {capacity}")
            pooled = np.zeros((*rows[:2], capacity // spec.kernel_stride, size), np.float32)
        if dtype == "int8":
            key_scales = np.zeros((*rows, -(-size // KEY_GROUP)), np.float16)
            value_scales = np.zeros(rows, np.float16)
        key = np.zeros((*rows, size), np.dtype(dtype))
        value = None if spec.is_latent else np.zeros_like(key)
        return cls(key, value, pooled, key_scales, value_scales)

    @property
    def capacity(self) -> int:
        """Rows that it holds at most."""
        return int(self.key.shape[2])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    def keys(self, first: int, stop: int) -> Floats:
        """Keys of rows [first, stop) as the kernels see them, float32 (B, kv_num_heads, n, D)."""
        rows = self.key[:, :, first:stop]
        if self.key_scales is None:
            return rows.astype(np.float32)
        return dequantize(rows.astype(np.int8), self.key_scales[:, :, first:stop], KEY_GROUP)

    def values(self, first: int, stop: int) -> Floats:
        """Values of rows [first, stop), likewise.

        Raises:
            ValueError: the cache is latent.
        """
        if self.value is None:
            raise ValueError("a latent cache has no values beside its keys")
        rows = self.value[:, :, first:stop]
        if self.value_scales is None:
            return rows.astype(np.float32)
        scales = self.value_scales[:, :, first:stop, None]
        return dequantize(rows.astype(np.int8), scales, rows.shape[-1])

    def write(
        self,
        first: int,
        keys: npt.NDArray[np.floating[Any]],
        values: npt.NDArray[np.floating[Any]] | None,
        kernel_size: int,
    ) -> None:
        """Put rows (B, kv_num_heads, n, D) at ``first``, and the pooled keys of the windows they complete.

        Args:
            values: None for a latent cache.
        """
        stop = first + keys.shape[2]
        if self.key_scales is None:
            self.key[:, :, first:stop] = keys
        else:
            self.key[:, :, first:stop], self.key_scales[:, :, first:stop] = quantize(keys, KEY_GROUP)
        if self.value is not None and values is not None:
            if self.value_scales is None:
                self.value[:, :, first:stop] = values
            else:
                codes, scales = quantize(values, values.shape[-1])
                self.value[:, :, first:stop], self.value_scales[:, :, first:stop] = codes, scales[..., 0]
        if self.pooled is None:
            return
        # Only the rows of windows that are not complete before `first`.
        window = max(0, (first - kernel_size) // (kernel_size // 2) + 1)
        start = window * (kernel_size // 2)
        for stored, pooled in zip(self.keys(start, stop), self.pooled, strict=True):
            pool_keys(stored, pooled[:, window:], kernel_size, max(0, first - start), stop - start)

    def resized(self, spec: SparseAttentionSpec, capacity: int) -> AttentionCache:
        """A cache of another capacity, for the same spec, with the rows that fit."""
        batch, _, _, size = self.key.shape
        # Untouched pages of zeros cost no memory.
        other = self.empty(spec, batch, capacity, size, self.key.dtype.name)
        other.copy_from(self)
        return other

    def copy_from(self, source: AttentionCache) -> None:
        """Take over the rows of a cache of the same spec and type, as far as they fit."""
        for mine, theirs in zip(self._arrays(), source._arrays(), strict=True):
            rows = min(mine.shape[2], theirs.shape[2])
            mine[:, :, :rows] = theirs[:, :, :rows]

    def c_struct(self, sequence: int) -> CCache:
        """What the C API takes; it does not keep the buffers alive.

        Raises:
            NativeError: a buffer has another type, or gaps between its elements.
        """
        number = _TYPE_NUMBERS.get(self.key.dtype)
        if number is None:
            raise NativeError(f"cache: expected float16 or int8, got {self.key.dtype}")

        def at(array: npt.NDArray[Any] | None, dtype: npt.DTypeLike) -> ctypes.c_void_p | None:
            return None if array is None else pointer(array[sequence], dtype)

        return CCache(
            number,
            at(self.key, self.key.dtype),
            at(self.value, self.key.dtype),
            at(self.key_scales, np.float16),
            at(self.value_scales, np.float16),
            at(self.pooled, np.float32),
            self.capacity,
        )

    def _arrays(self) -> list[npt.NDArray[Any]]:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [array for array in fields if array is not None]
