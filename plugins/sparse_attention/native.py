"""``cpm.SparseAttention`` through the native library, on caches that are updated in place."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, best_isa, check, library, pointer
from cpm_edge.plugins.sparse_attention.cache import KEY_GROUP, AttentionCache
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

__all__ = ["AttentionCache", "AttentionCall", "sparse_attention"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]

_POINTERS = ("query", "key", "value")


class CAttentionSpec(ctypes.Structure):
    _fields_ = (
        ("num_heads", ctypes.c_int32),
        ("kv_num_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("kernel_size", ctypes.c_int32),
        ("kernel_stride", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("init_blocks", ctypes.c_int32),
        ("window_size", ctypes.c_int32),
        ("topk", ctypes.c_int32),
        ("dense_len", ctypes.c_int32),
        ("coarse_lse", ctypes.c_int32),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_stride", ctypes.c_int64) for name in _POINTERS),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("past_length", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("selected", ctypes.c_void_p),
    )


class AttentionCall:
    """``sparse_attention`` with everything checked and converted: calling it costs what the kernel costs.

    May be called again; the cache then receives the same rows once more. Keeps its arrays alive. Arguments
    and errors as for ``sparse_attention``.

    Attributes:
        output: (B, T, num_heads * D), written by each call.
    """

    def __init__(
        self,
        pool: ThreadPool,
        spec: SparseAttentionSpec,
        query: Floats,
        key: Floats,
        value: Floats,
        cache: AttentionCache,
        past_length: npt.NDArray[np.int64],
        *,
        rotation: tuple[Floats, Floats] | None = None,
        isa: Isa | None = None,
        out: Floats | None = None,
        selected: Indices | None = None,
    ) -> None:
        self.output = np.empty(query.shape, np.float32) if out is None else out
        _check_shapes(spec, query, key, value, cache, past_length, rotation, self.output, selected)
        self._kept = (query, key, value, cache, rotation, selected)
        self._pool = pool
        self._isa = ctypes.c_int32(best_isa() if isa is None else isa)
        self._spec = CAttentionSpec(head_size=query.shape[2] // spec.num_heads, **spec.attributes())
        self._sequences = []
        for b, past in enumerate(past_length.tolist()):
            rows = _Rows(
                past_length=past,
                rows=query.shape[1],
                output=pointer(self.output[b], np.float32),
                selected=None if selected is None else pointer(selected[b], np.int32),
            )
            for name, array in zip(_POINTERS, (query, key, value), strict=True):
                setattr(rows, name, array[b].ctypes.data)
                setattr(rows, f"{name}_stride", _row_stride(name, array[b]))
            if rotation is not None:
                rows.cosine, rows.sine = (pointer(table[b], np.float32) for table in rotation)
            self._sequences.append((cache.c_struct(b), rows))

    def __call__(self) -> None:
        """Append the rows and attend."""
        function = library().cpm_sparse_attention
        for cache, rows in self._sequences:
            status = function(
                self._pool.handle,
                self._isa,
                ctypes.byref(self._spec),
                ctypes.byref(cache),
                ctypes.byref(rows),
            )
            check(status, f"cpm_sparse_attention, {rows.rows} rows after {rows.past_length}")


def sparse_attention(
    pool: ThreadPool,
    spec: SparseAttentionSpec,
    query: Floats,
    key: Floats,
    value: Floats,
    cache: AttentionCache,
    past_length: npt.NDArray[np.int64],
    *,
    rotation: tuple[Floats, Floats] | None = None,
    isa: Isa | None = None,
    out: Floats | None = None,
    selected: Indices | None = None,
) -> Floats:
    """The output (B, T, num_heads * D); ``cache`` receives the new rows and the pooled keys they complete.

    Args:
        query, key, value: (B, T, heads * D) float32. Columns of one wider matrix are read in place.
        past_length: (B,) rows that the cache holds already.
        rotation: cosines and sines (B, T, D / 2) to rotate query and key by halves; None if they are rotated.
        selected: (B, T, kv_num_heads, budget), receives the chosen blocks, -1 for none; left alone by
            a dense spec.

    Raises:
        NativeError: shapes that do not fit together, other types, or more rows than the cache has left.
    """
    options: dict[str, Any] = {"rotation": rotation, "isa": isa, "out": out, "selected": selected}
    call = AttentionCall(pool, spec, query, key, value, cache, past_length, **options)
    call()
    return call.output


def _check_shapes(
    spec: SparseAttentionSpec,
    query: Floats,
    key: Floats,
    value: Floats,
    cache: AttentionCache,
    past_length: npt.NDArray[np.int64],
    rotation: tuple[Floats, Floats] | None,
    output: Floats,
    selected: Indices | None,
) -> None:
    batch, rows, width = query.shape
    size, heads, capacity = width // spec.num_heads, spec.kv_num_heads, cache.key.shape[2]
    expected: dict[str, tuple[npt.NDArray[Any] | None, tuple[int, ...]]] = {
        "query": (query, (batch, rows, spec.num_heads * size)),
        "key": (key, (batch, rows, heads * size)),
        "value": (value, (batch, rows, heads * size)),
        "past_length": (past_length, (batch,)),
        "key cache": (cache.key, (batch, heads, capacity, size)),
        "value cache": (cache.value, (batch, heads, capacity, size)),
        "out": (output, (batch, rows, width)),
        "selected": (selected, (batch, rows, heads, spec.budget)),
    }
    if cache.key.dtype == np.int8:
        if cache.key_scales is None or cache.value_scales is None:
            raise NativeError("cache scales: an int8 cache needs them")
        expected["key scales"] = (cache.key_scales, (batch, heads, capacity, -(-size // KEY_GROUP)))
        expected["value scales"] = (cache.value_scales, (batch, heads, capacity))
    if not spec.is_dense:
        if cache.pooled is None:
            raise NativeError("pooled cache: a sparse spec needs one")
        expected["pooled cache"] = (cache.pooled, (batch, heads, capacity // spec.kernel_stride, size))
    for name, table in zip(("cosines", "sines"), rotation or (), strict=False):
        expected[name] = (table, (batch, rows, size // 2))
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise NativeError(f"{name}: expected {shape}, got {array.shape}")


def _row_stride(name: str, array: Floats) -> int:
    """Floats from one row of (T, n) to the next."""
    if len(array) <= 1 and array.dtype == np.float32 and array.flags.c_contiguous:
        return int(array.shape[1])
    if array.dtype != np.float32 or array.strides[1] != 4 or array.strides[0] % 4:
        raise NativeError(f"{name}: expected float32 rows without gaps, got {array.dtype} {array.strides}")
    return array.strides[0] // 4
