"""Bytes that a session keeps of a sequence: keys and values, latents, pooled keys, states."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.shape import ModelShape

ITEM = {"fp32": 4, "fp16": 2, "int8": 1}
KEY_GROUP = 32  # columns of an int8 key that share a float16 scale
BLOCK = 64
SNAPSHOT_BUDGET, MOST_SNAPSHOTS = 256 << 20, 16
# Per target and flavour: formats of the cache, the default first.
_FORMATS = {
    "ort": ("fp32",),
    "aipc stock": ("fp16", "fp32", "int8"),
    "aipc native": ("fp16", "int8"),
    "jetson": ("fp16",),
    "rtx": ("fp16",),
}


@dataclass(frozen=True)
class CacheBytes:
    """Bytes at one capacity.

    Attributes:
        format: of keys and values.
        capacity: rows that the buffers hold.
        rows: keys and values, or latents, with their scales.
        pooled: pooled keys of sparse attention.
        states: of recurrent layers.
        snapshots: the most that copies of the states take, so that a session can go back.
    """

    format: str
    capacity: int
    rows: int
    pooled: int
    states: int
    snapshots: int

    @property
    def total(self) -> int:
        """Without snapshots, which come with going back."""
        return self.rows + self.pooled + self.states


def place(target: str, flavour: str) -> str:
    """The key of what depends on target and flavour: ``aipc native``, ``ort``."""
    return f"aipc {flavour}" if target == "aipc" else target


def cache_format(shape: ModelShape, target: str, flavour: str, asked: str | None, weights: str) -> str:
    """What ``--kv-cache`` settles to.

    Raises:
        PlanError: the target does not keep this model's cache in it.
    """
    where = place(target, flavour)
    choices = _FORMATS[where]
    if where == "aipc stock" and shape.is_latent:
        choices = ("fp32",)
    elif where == "aipc native" and shape.is_latent:
        choices = ("fp16",)
    elif where == "aipc stock" and shape.sparse is not None:
        choices = ("fp16", "fp32")
    if where == "aipc stock" and weights == "fp32":
        choices = ("fp32", *(each for each in choices if each != "fp32"))
    if asked is None:
        return choices[0]
    if asked not in choices:
        raise PlanError(f"--kv-cache: expected {' or '.join(choices)} for {where}, got {asked}")
    return asked


def cache_bytes(shape: ModelShape, context: int, target: str, flavour: str, form: str) -> CacheBytes:
    """What a session of ``context`` tokens holds when it is full."""
    where, sparse = place(target, flavour), shape.sparse
    multiple = BLOCK if where in ("aipc native", "jetson") else 1
    if where == "ort" and sparse is not None:
        multiple = sparse.block_size
    capacity = -(-context // multiple) * multiple
    row = shape.cached * ITEM[form]
    if form == "int8" and where == "aipc native":
        row += shape.kv_heads * 2 * (-(-shape.head_dim // KEY_GROUP) + 1)
    pooled = 0
    if sparse is not None and where in ("aipc native", "jetson"):
        item = 4 if where == "aipc native" else 2
        pooled = shape.kv_heads * shape.head_dim * item * (capacity // sparse.kernel_stride)
    states = 4 * shape.state * shape.state_layers
    snapshots = 0
    if states:
        snapshots = states * max(1, min(MOST_SNAPSHOTS, SNAPSHOT_BUDGET // states))
    layers = shape.cache_layers
    return CacheBytes(form, capacity, layers * row * capacity, layers * pooled, states, snapshots)


def read_bytes(shape: ModelShape, position: int, form: str, target: str) -> float:
    """What one decode step at ``position`` reads of it: all rows, or pooled keys and the chosen blocks."""
    rows, windows, sparse = position + 1, 0, shape.sparse
    if sparse is not None and rows >= sparse.dense_len:
        windows = max(0, (rows - sparse.kernel_size) // sparse.kernel_stride + 1)
        blocks = min(sparse.budget, position // sparse.block_size + 1)
        rows = (blocks - 1) * sparse.block_size + position % sparse.block_size + 1
    pooled = shape.kv_heads * shape.head_dim * (2 if target in ("jetson", "rtx") else 4)
    each = rows * shape.cached * ITEM[form] + windows * pooled
    return shape.cache_layers * each + 2 * 4 * shape.state * shape.state_layers
