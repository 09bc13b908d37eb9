"""Attention, dense and sparse, beside PyTorch's dense scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right

from cpm_edge.benchmarks.gpu_check.case import Array, Call, Case, Empty, worst
from cpm_edge.plugins.sparse_attention.launches import plan
from cpm_edge.plugins.sparse_attention.reference import pooled_keys, sparse_attention
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

CHECKED_ROWS = 4
# A third of the blocks that a row may choose carry its attention, e^12 times what other keys get: which of
# the others are chosen, where float16 decides, does not show.
PLANTED_SCORE = 12.0


def cases(
    spec: SparseAttentionSpec, size: int, contexts: Sequence[int], row_counts: Sequence[int]
) -> Iterator[Case]:
    """Each kind of attention, for new rows that end at each context."""
    dense = SparseAttentionSpec.dense(spec.num_heads, spec.kv_num_heads, spec.scale)
    for each in (dense, spec) if not spec.is_dense else (dense,):
        for context in contexts:
            if not each.is_dense and context < each.dense_len:
                continue
            for rows in row_counts:
                if rows <= context:
                    yield attention_case(each, size, context, rows)


def attention_case(spec: SparseAttentionSpec, size: int, context: int, rows: int) -> Case:
    """``rows`` new rows, the last of which sees ``context`` tokens."""
    capacity = -(-context // spec.block_size) * spec.block_size
    data = _Data.draw(spec, size, context, rows)
    caches = data.caches(capacity)
    past = context - rows
    in_place = [3, 4] if spec.is_dense else [3, 4, 6]
    pooled = [] if spec.is_dense else [_pooled(caches[0], past, spec)]
    seen = _seen(spec, context)
    width = spec.kv_num_heads * size
    scored = 0 if spec.is_dense else context // spec.kernel_stride
    new = [data.query, *(each[:, past:].copy() for each in (data.key, data.value))]
    return Case(
        op="attention",
        name=f"{'dense' if spec.is_dense else 'sparse'}, {context} tokens",
        rows=rows,
        plan=plan(spec, size, capacity),
        inputs=[*new, *caches, np.array([past], np.int32), *pooled],
        outputs=[Empty((1, rows, spec.num_heads * size), torch.float16), *in_place],
        error=_Error(spec, data, caches),
        bytes=2 * width * (2 * seen + scored) + 4 * rows * size * spec.num_heads,
        operations=4 * spec.num_heads * size * _pairs(spec, past, rows),
        peer="dense SDPA",
        make_peer=_Peer(spec, size, data, past),
    )


class _Data:
    """Rows of all tokens; ``query`` only of the new ones."""

    def __init__(self, query: Array, key: Array, value: Array, kv_heads: int) -> None:
        self.query, self.key, self.value, self._kv_heads = query, key, value, kv_heads

    @classmethod
    def draw(cls, spec: SparseAttentionSpec, size: int, context: int, rows: int) -> _Data:
        rng = np.random.default_rng(context)
        kv, group = spec.kv_num_heads, spec.group
        query = rng.standard_normal((rows, kv, group, size), np.float32)
        key, value = rng.standard_normal((2, context, kv, size), np.float32)
        direction = rng.standard_normal((kv, size), np.float32)
        direction *= np.sqrt(PLANTED_SCORE / spec.scale) / np.linalg.norm(direction, axis=1, keepdims=True)
        blocks = context // spec.block_size
        count = max(1, min(blocks, (spec.topk or blocks) // 3))
        for head in range(kv):
            planted = rng.choice(max(blocks, 1), count, replace=False)
            key[np.isin(np.arange(context) // spec.block_size, planted), head] += direction[head]
        query += direction[:, None]

        def rounded(rows: Array) -> Array:
            return rows.reshape(1, len(rows), -1).astype(np.float16)

        return cls(rounded(query), rounded(key), rounded(value), kv)

    def caches(self, capacity: int) -> list[Array]:
        """Keys and values (1, kv heads, capacity, size) of all tokens; the new ones are written again."""
        found = []
        for each in (self.key, self.value):
            rows = each.reshape(1, each.shape[1], self._kv_heads, -1).swapaxes(1, 2)
            cache = np.zeros((*rows.shape[:2], capacity, rows.shape[3]), np.float16)
            cache[:, :, : rows.shape[2]] = rows
            found.append(cache)
        return found


class _Error:
    """Of some rows against the reference.

    The kernels round the weights of values, and the output, to float16: 2^-11 of the same sum over absolute
    values, and of the output. 2^-17 is for exponentials of float32 scores.
    """

    def __init__(self, spec: SparseAttentionSpec, data: _Data, caches: Sequence[Array]) -> None:
        self._spec, self._data = spec, data
        self._caches = [each.astype(np.float32) for each in caches]

    def __call__(self, outputs: Sequence[Array]) -> float:
        rows = outputs[0].shape[1]
        chosen = np.linspace(0, rows - 1, min(CHECKED_ROWS, rows), dtype=int)
        return float(np.max([self._of_row(outputs[0], rows, row) for row in chosen]))  # NaN stays

    def _of_row(self, output: Array, rows: int, row: int) -> float:
        position = self._data.key.shape[1] - rows + row
        query = self._data.query[:, [row]].astype(np.float32)
        key, value = (each[:, [position]].astype(np.float32) for each in (self._data.key, self._data.value))
        past = np.array([position])
        keys, values = self._caches
        expected, *_ = sparse_attention(query, key, value, keys, values, past, spec=self._spec)
        absolute, *_ = sparse_attention(
            query, key, np.abs(value), keys, np.abs(values), past, spec=self._spec
        )
        bound = (2.0**-11 + 2.0**-17) * absolute + 2.0**-11 * np.abs(expected) + 2.0**-20
        return worst(output[:, [row]], expected, bound)


class _Peer:
    def __init__(self, spec: SparseAttentionSpec, size: int, data: _Data, past: int) -> None:
        self._spec, self._size, self._data, self._past = spec, size, data, past

    def __call__(self, device: torch.device) -> Call:
        def heads(rows: Array, count: int) -> torch.Tensor:
            tensor = torch.from_numpy(rows).to(device)
            return tensor.reshape(1, rows.shape[1], count, self._size).transpose(1, 2).contiguous()

        query = heads(self._data.query, self._spec.num_heads)
        key, value = (heads(each, self._spec.kv_num_heads) for each in (self._data.key, self._data.value))
        rows, context = query.shape[2], key.shape[2]
        mask = None if rows == 1 else causal_lower_right(rows, context)
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self._spec.scale, enable_gqa=True
        )


def _pooled(keys: Array, past: int, spec: SparseAttentionSpec) -> Array:
    """The cache of pooled keys after ``past`` rows."""
    _, heads, capacity, size = keys.shape
    found = np.zeros((1, heads, capacity // spec.kernel_stride, size), np.float16)
    for head in range(heads):
        means = pooled_keys(keys[0, head, :past].astype(np.float32), spec.kernel_size, spec.kernel_stride)
        found[0, head, : len(means)] = means
    return found


def _seen(spec: SparseAttentionSpec, context: int) -> int:
    """Tokens that one row at the end of the context attends to."""
    return context if spec.is_dense else min(context, spec.budget * spec.block_size)


def _pairs(spec: SparseAttentionSpec, past: int, rows: int) -> int:
    """Of queries and keys."""
    return sum(
        position + 1 if position + 1 < spec.dense_len or spec.is_dense else _seen(spec, position + 1)
        for position in range(past, past + rows)
    )
