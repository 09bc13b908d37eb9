"""Numpy statement of ``cpm.SparseAttention``: one query position at a time, float32, no shortcuts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cpm_edge.plugins.sparse_attention.spec import EXPONENT_LIMIT, SparseAttentionSpec


@dataclass
class Trace:
    """What the selection did, for tests.

    Attributes:
        gaps: one entry per (batch, kv head, sparse row whose blocks exceed the budget): the score of the
            worst chosen block minus the best rejected one; 0 is an exact tie.
        selected: chosen block indices, keyed by (batch, kv head, position).
    """

    gaps: dict[tuple[int, int, int], float] = field(default_factory=dict)
    selected: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)


def sparse_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray | None,
    key_cache: np.ndarray,
    value_cache: np.ndarray | None,
    past_length: np.ndarray,
    pooled_cache: np.ndarray | None = None,
    *,
    spec: SparseAttentionSpec,
    trace: Trace | None = None,
) -> tuple[np.ndarray, ...]:
    """Run the op; shapes as in ``spec``. Returns (output, present_key[, present_value][, present_pooled]).

    Raises:
        ValueError: if the new rows do not fit the cache.
    """
    batch, rows, _ = query.shape
    capacity, size = key_cache.shape[2:]
    if int(past_length.max()) + rows > capacity:
        raise ValueError(f"cache: {int(past_length.max()) + rows} rows do not fit a capacity of {capacity}")
    width = spec.v_head_size or size
    presents = [cache.copy() for cache in (key_cache, value_cache) if cache is not None]
    news = [new for new in (key, value) if new is not None]
    present_key, present_value = presents[0], presents[-1]
    output = np.empty((batch, rows, spec.num_heads, width), np.float32)
    for b in range(batch):
        past = int(past_length[b])
        for cache, new in zip(presents, news, strict=True):
            cache[b, :, past : past + rows] = new[b].reshape(rows, spec.kv_num_heads, size).swapaxes(0, 1)
        for t in range(rows):
            heads = query[b, t].reshape(spec.kv_num_heads, spec.group, size).astype(np.float32)
            for h in range(spec.kv_num_heads):
                keys, values = present_key[b, h].astype(np.float32), present_value[b, h].astype(np.float32)
                tokens = _visible_tokens(heads[h], keys, past + t, spec, trace, (b, h))
                first = h * spec.group
                output[b, t, first : first + spec.group] = _attend(
                    heads[h], keys[tokens], values[tokens, :width], spec.scale
                )
    results = (output.reshape(batch, rows, -1), *presents)
    if pooled_cache is None:
        return results
    return (*results, _update_pooled(pooled_cache, present_key, past_length + rows, spec))


def pooled_keys(keys: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """Means of the complete windows of ``keys`` (n, D): ((n - kernel) // stride + 1, D)."""
    count = max((len(keys) - kernel) // stride + 1, 0)
    windows = [keys[stride * j : stride * j + kernel].mean(0) for j in range(count)]
    return np.stack(windows) if windows else np.empty((0, keys.shape[1]), keys.dtype)


def block_scores(query: np.ndarray, keys: np.ndarray, spec: SparseAttentionSpec) -> np.ndarray:
    """Scores of the blocks that the last row of ``keys`` may see.

    Args:
        query: (group, D) of one kv head at position ``len(keys) - 1``.
        keys: (position + 1, D).

    Returns:
        (number of blocks,) float32; +inf for forced blocks, -inf for a block without a complete window.
    """
    k1 = pooled_keys(keys, spec.kernel_size, spec.kernel_stride)
    k2 = pooled_keys(keys, 4 * spec.kernel_size, 4 * spec.kernel_stride)
    s1 = query @ k1.T * np.float32(spec.scale)
    normaliser = query @ k2.T * np.float32(spec.scale) if spec.coarse_lse and len(k2) else s1
    last = (len(keys) - 1) // spec.block_size
    scores = np.full(last + 1, -np.inf, np.float32)
    if len(k1):
        top = normaliser.max(1, keepdims=True)
        total = np.exp(normaliser - top).sum(1, keepdims=True)
        probability = (np.exp(np.minimum(s1 - top, EXPONENT_LIMIT)) / total).sum(0)
        for b in range(last + 1):
            window = probability[max(4 * b - 1, 0) : 4 * b + 4]
            scores[b] = window.max() if len(window) else -np.inf
    scores[: spec.init_blocks] = np.inf
    scores[max(last + 1 - spec.local_blocks, 0) :] = np.inf
    return scores


def _visible_tokens(
    query: np.ndarray,
    keys: np.ndarray,
    position: int,
    spec: SparseAttentionSpec,
    trace: Trace | None,
    where: tuple[int, int],
) -> np.ndarray:
    tokens = np.arange(position + 1)
    if spec.is_dense or position + 1 < spec.dense_len:
        return tokens
    scores = block_scores(query, keys[: position + 1], spec)
    order = np.argsort(-scores, kind="stable")
    chosen = np.sort(order[: spec.budget])
    if trace is not None:
        row = (*where, position)
        trace.selected[row] = chosen
        if len(order) > spec.budget:
            worst, rejected = scores[order[spec.budget - 1]], scores[order[spec.budget]]
            trace.gaps[row] = float(worst - rejected) if worst != rejected else 0.0
    return tokens[np.isin(tokens // spec.block_size, chosen)]


def _attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    scores = query @ keys.T * np.float32(scale)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    attended: np.ndarray = weights @ values / weights.sum(1, keepdims=True)
    return attended


def _update_pooled(
    pooled: np.ndarray, present_key: np.ndarray, length: np.ndarray, spec: SparseAttentionSpec
) -> np.ndarray:
    present = pooled.copy()
    for b in range(len(length)):
        for h in range(spec.kv_num_heads):
            rows = pooled_keys(present_key[b, h, : int(length[b])], spec.kernel_size, spec.kernel_stride)
            present[b, h, : len(rows)] = rows
    return present
