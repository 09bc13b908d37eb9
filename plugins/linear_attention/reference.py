"""Numpy statement of ``cpm.LinearAttention``: one token at a time, in the precision of its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec

Array = npt.NDArray[Any]


def linear_attention(
    query: Array, key: Array, value: Array, past_state: Array, *, spec: LinearAttentionSpec
) -> tuple[Array, Array]:
    """Run the op; shapes as in ``spec``, all float32 or all float64. Returns (output, present_state).

    The attributes are rounded to float32 first, as ONNX stores them, whatever the precision.
    """
    batch, rows, _ = query.shape
    dtype = past_state.dtype
    keep = np.exp(np.asarray(spec.decay, np.float32).astype(dtype))[:, None, None]
    scale = np.asarray(spec.scale, np.float32).astype(dtype)
    heads = (batch, rows, spec.num_heads, -1)
    query, key, value = (array.reshape(heads) for array in (query, key, value))
    state = past_state.copy()
    output = np.empty_like(value)
    for t in range(rows):
        state = keep * state + key[:, t, :, :, None] * value[:, t, :, None, :]
        output[:, t] = scale * np.einsum("bhd,bhdv->bhv", query[:, t], state)
    return output.reshape(batch, rows, -1), state
