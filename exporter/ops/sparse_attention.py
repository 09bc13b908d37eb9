"""``cpm.SparseAttention`` in torch: computed when called eagerly, one ONNX node when exported."""

from __future__ import annotations

import torch
from torch import Tensor

from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.sparse_attention.spec import EXPONENT_LIMIT, OP, SparseAttentionSpec

LOWEST = torch.finfo(torch.float32).min


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    past_length: Tensor,
    *,
    spec: SparseAttentionSpec,
) -> tuple[Tensor, ...]:
    """Run or record the op; shapes as in ``cpm_edge.plugins.sparse_attention.spec``.

    Returns:
        output (B, T, num_heads * D), present_key and present_value (B, kv_num_heads, C, D); the latent form
        has no present_value, and an output of (B, T, num_heads * v_head_size).
    """
    if torch.compiler.is_exporting():
        inputs = (query, key, value, key_cache, value_cache, past_length)
        size = spec.v_head_size or key_cache.shape[3]
        caches = [cache for cache in (key_cache, value_cache) if cache is not None]
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{OP}",
            inputs,
            attrs={**spec.attributes()},
            dtypes=[query.dtype, *(cache.dtype for cache in caches)],
            shapes=[(*query.shape[:2], spec.num_heads * size), *(cache.shape for cache in caches)],
            version=VERSION,
        )
        return tuple(outputs)
    return _eager(query, key, value, key_cache, value_cache, past_length, spec)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    past_length: Tensor,
    spec: SparseAttentionSpec,
) -> tuple[Tensor, ...]:
    batch, rows, _ = query.shape
    position = past_length[:, None] + torch.arange(rows)
    presents = [_write_rows(key_cache, key, position)]
    if value is not None and value_cache is not None:
        presents.append(_write_rows(value_cache, value, position))

    longest = int(position.max()) + 1
    keys, values = (presents[i][:, :, :longest].float() for i in (0, -1))
    if spec.is_latent:
        values = values[..., : spec.v_head_size]
    heads = query.float().view(batch, rows, spec.kv_num_heads, spec.group, -1).permute(0, 2, 3, 1, 4)
    visible = (torch.arange(longest) <= position[..., None])[:, None, None]
    sparse = position + 1 >= spec.dense_len
    if not spec.is_dense and bool(sparse.any()):
        chosen = _chosen_tokens(heads, keys, position, spec)[:, :, None]
        visible = visible & (chosen | ~sparse[:, None, None, :, None])
    scores = heads @ keys.unsqueeze(2).transpose(-1, -2) * spec.scale
    weights = torch.softmax(scores.masked_fill(~visible, LOWEST), -1)
    output = (weights @ values.unsqueeze(2)).permute(0, 3, 1, 2, 4).reshape(batch, rows, -1)
    return output.to(query.dtype), *presents


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    heads, size = cache.shape[1], cache.shape[3]
    new = rows.view(*rows.shape[:2], heads, size).transpose(1, 2)
    index = position[:, None, :, None].expand_as(new)
    return cache.scatter(2, index, new.to(cache.dtype))


def _chosen_tokens(query: Tensor, keys: Tensor, position: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """Tokens of the selected blocks: bool (B, H, T, C) for query (B, H, G, T, D), keys (B, H, C, D)."""
    score = _block_scores(query, keys, position, spec)
    blocks = torch.arange(score.shape[-1])
    current = position[..., None] // spec.block_size
    forced = (blocks < spec.init_blocks) | (blocks > current - spec.local_blocks)
    score = score.masked_fill(forced[:, None], torch.inf)
    score = score.masked_fill((blocks > current)[:, None], -torch.inf)
    # torch.topk leaves the order of ties open; a stable sort takes the lowest index first.
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., : spec.budget]
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)
    return chosen.repeat_interleave(spec.block_size, -1)[..., : keys.shape[2]]


def _block_scores(query: Tensor, keys: Tensor, position: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """Max-pooled stage-1 scores (B, H, T, blocks), before the forced and the future blocks."""
    blocks = -(-keys.shape[2] // spec.block_size)
    k1, seen1 = _pool(keys, position, spec.kernel_size, spec.kernel_stride)
    if not k1.shape[2]:
        return query.new_zeros(*query.shape[:2], query.shape[3], blocks)
    s1 = _stage_one(query, k1, seen1, spec.scale)
    top = s1.amax(-1, keepdim=True)
    total = (s1 - top).exp().masked_fill(~seen1, 0).sum(-1, keepdim=True)
    k2, seen2 = _pool(keys, position, 4 * spec.kernel_size, 4 * spec.kernel_stride)
    if spec.coarse_lse and k2.shape[2]:
        s2 = _stage_one(query, k2, seen2, spec.scale)
        any_seen = seen2.any(-1, keepdim=True)
        top2 = s2.amax(-1, keepdim=True)
        total2 = (s2 - top2).exp().masked_fill(~seen2, 0).sum(-1, keepdim=True)
        top, total = torch.where(any_seen, top2, top), torch.where(any_seen, total2, total)
    probability = (s1 - top).clamp(max=EXPONENT_LIMIT).exp() / total
    probability = probability.masked_fill(~seen1, 0).sum(2)
    padded = torch.nn.functional.pad(probability, (1, 4 * blocks + 4 - probability.shape[-1]))
    return padded.unfold(-1, 5, 4)[..., :blocks, :].amax(-1)


def _pool(keys: Tensor, position: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Means of complete windows (B, H, W, D), and which are visible: bool (B, 1, 1, T, W)."""
    pooled = keys.unfold(2, kernel, stride).mean(-1) if keys.shape[2] >= kernel else keys[:, :, :0]
    end = torch.arange(pooled.shape[2]) * stride + kernel
    return pooled, (end <= position[..., None] + 1)[:, None, None]


def _stage_one(query: Tensor, pooled: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = query @ pooled.unsqueeze(2).transpose(-1, -2) * scale
    return scores.masked_fill(~seen, LOWEST)
