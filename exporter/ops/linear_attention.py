"""``cpm.LinearAttention`` in torch: computed when called eagerly, one ONNX node when exported."""

from __future__ import annotations

import torch
from torch import Tensor

from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.linear_attention.spec import OP, LinearAttentionSpec

CHUNK = 64


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, past_state: Tensor, *, spec: LinearAttentionSpec
) -> tuple[Tensor, Tensor]:
    """Run or record the op; shapes as in ``cpm_edge.plugins.linear_attention.spec``.

    Returns:
        output (B, T, H * Dv) and present_state (B, H, D, Dv), float32.
    """
    if torch.compiler.is_exporting():
        output, present_state = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{OP}",
            (query, key, value, past_state),
            attrs={**spec.attributes()},
            dtypes=[value.dtype, past_state.dtype],
            shapes=[value.shape, past_state.shape],
            version=VERSION,
        )
        return output, present_state
    return _eager(query, key, value, past_state, spec)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, spec: LinearAttentionSpec
) -> tuple[Tensor, Tensor]:
    """In chunks: rows of one chunk meet each other in a product weighted by their decay, and those before
    them through the state. No exponent is above 0."""
    batch, rows, _ = query.shape
    query, key, value = (
        each.view(batch, rows, spec.num_heads, -1).transpose(1, 2) for each in (query, key, value)
    )
    decay = torch.tensor(spec.decay)[:, None, None]
    outputs = []
    for start in range(0, rows, CHUNK):
        q, k, v = (each[:, :, start : start + CHUNK] for each in (query, key, value))
        row = torch.arange(q.shape[2])
        distance = row[:, None] - row
        within = torch.exp(decay * distance.clamp(min=0)).masked_fill(distance < 0, 0)
        before = torch.exp(decay * (row + 1)[:, None])
        outputs.append((q @ k.transpose(-1, -2) * within) @ v + q @ state * before)
        after = torch.exp(decay * (len(row) - 1 - row)[:, None])
        state = torch.exp(decay * len(row)) * state + (k * after).transpose(-1, -2) @ v
    output = torch.cat(outputs, 2) * spec.scale
    return output.transpose(1, 2).reshape(batch, rows, -1), state
