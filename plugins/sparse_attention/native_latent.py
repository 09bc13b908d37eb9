"""Latent attention through the native library, with its norm, rotation and up-projections in one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, best_isa, check, library, pointer
from cpm_edge.plugins.sparse_attention.cache import AttentionCache

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class LatentSizes:
    """What the kernel is told about a layer.

    Attributes:
        num_heads: query heads.
        rank: columns of a latent, a multiple of 8.
        nope_size, rope_size: columns of a query head without and with position; the latter a multiple of 8.
        value_size: of a head's value, a multiple of 16.
        scale: factor on the scores.
        epsilon: of the latents' normalization.
    """

    num_heads: int
    rank: int
    nope_size: int
    rope_size: int
    value_size: int
    scale: float
    epsilon: float = 1e-6

    @property
    def width(self) -> int:
        """Columns of a cached row."""
        return self.rank + self.rope_size

    @property
    def query_size(self) -> int:
        return self.nope_size + self.rope_size

    @property
    def up_rows(self) -> int:
        """Rows of the up-projection: for each head those of its keys, then those of its values."""
        return self.num_heads * (self.nope_size + self.value_size)


@dataclass(frozen=True)
class UpProjection:
    """The up-projection (up_rows, rank) in integers: codes times the scale of their group.

    Attributes:
        codes: int8 (up_rows, rank).
        scales: float32 (up_rows, groups).
    """

    codes: Codes
    scales: Floats

    def packed(self) -> npt.NDArray[np.uint8]:
        """The bytes that a graph holds: scales, then codes."""
        scales = np.ascontiguousarray(self.scales, "<f4").view(np.uint8).reshape(-1)
        return np.concatenate([scales, np.ascontiguousarray(self.codes).view(np.uint8).reshape(-1)])


class CLatentSpec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_heads", "rank", "nope_size", "rope_size", "value_size")),
        ("groups", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


class CLatentRows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "latent")),
        *((name, ctypes.c_int64) for name in ("query_stride", "latent_stride")),
        *((name, ctypes.c_void_p) for name in ("norm", "cosine", "sine", "scales", "codes")),
        ("past_length", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("output", ctypes.c_void_p),
    )


def latent_attention(
    pool: ThreadPool,
    sizes: LatentSizes,
    query: Floats,
    latent: Floats,
    norm: Floats,
    rotation: tuple[Floats, Floats],
    up: UpProjection,
    cache: Halves,
    past_length: int,
    *,
    isa: Isa | None = None,
    out: Floats | None = None,
) -> Floats:
    """The output (T, num_heads * value_size) of one sequence; ``cache`` receives the new rows.

    Args:
        query: (T, num_heads * query_size), before rotation.
        latent: (T, width): latents before their normalization, then the key before its rotation.
        norm: (rank,) weight of the normalization.
        rotation: cosines and sines (T, rope_size / 2), to rotate by halves.
        cache: (capacity, width), rows [0, past_length) valid.

    Raises:
        NativeError: shapes or types that do not fit together, or more rows than the cache has left.
    """
    rows = len(query)
    output = np.empty((rows, sizes.num_heads * sizes.value_size), np.float32) if out is None else out
    expected: dict[str, tuple[npt.NDArray[Any], tuple[int, ...]]] = {
        "query": (query, (rows, sizes.num_heads * sizes.query_size)),
        "latent": (latent, (rows, sizes.width)),
        "norm": (norm, (sizes.rank,)),
        "cosines": (rotation[0], (rows, sizes.rope_size // 2)),
        "sines": (rotation[1], (rows, sizes.rope_size // 2)),
        "codes": (up.codes, (sizes.up_rows, sizes.rank)),
        "scales": (up.scales, (sizes.up_rows, up.scales.shape[1])),
        "cache": (cache, (len(cache), sizes.width)),
        "out": (output, (rows, sizes.num_heads * sizes.value_size)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise NativeError(f"{name}: expected {shape}, got {array.shape}")
    spec = CLatentSpec(
        sizes.num_heads, sizes.rank, sizes.nope_size, sizes.rope_size, sizes.value_size, up.scales.shape[1],
        sizes.scale, sizes.epsilon,
    )  # fmt: skip
    step = CLatentRows(
        query_stride=query.shape[1], latent_stride=sizes.width, past_length=past_length, rows=rows
    )
    for name, array in (
        ("query", query), ("latent", latent), ("norm", norm), ("cosine", rotation[0]), ("sine", rotation[1]),
        ("scales", up.scales), ("output", output),
    ):  # fmt: skip
        setattr(step, name, pointer(array, np.float32))
    step.codes = pointer(up.codes, np.int8)
    buffers = AttentionCache(cache[None, None], None, None).c_struct(0)
    level = ctypes.c_int32(best_isa() if isa is None else isa)
    status = library().cpm_latent_attention(
        pool.handle, level, ctypes.byref(spec), ctypes.byref(buffers), ctypes.byref(step)
    )
    check(status, f"cpm_latent_attention, {rows} rows after {past_length}")
    return output
