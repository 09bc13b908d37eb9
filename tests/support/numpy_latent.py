"""Multi-head latent attention in numpy, float64, expanded: every head gets keys and values of its own.

    q    = W_qb RMS(W_qa x)         a head: [q_nope | q_rope]
    c, k = W_kva x                  one latent and one key to rotate, for all heads
    W_kvb RMS(c)                    a head: [k_nope | v]
    softmax(([q_nope | R q_rope] . [k_nope | R k]) / sqrt(nope + rope)) v

Written from the equations of DeepSeek-V2 (section 2.1.2); the exporter's module never expands anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]

EPS = 1e-6  # of both latents, whatever rms_norm_eps is


def latent_attention(
    config: dict[str, Any], own: dict[str, Float64s], x: Float64s, cos: Float64s, sin: Float64s
) -> Float64s:
    """(T, hidden) in and out, causal.

    Args:
        config: the raw config.json.
        own: the layer's tensors by name.
        cos, sin: (T, 1, qk_rope_head_dim / 2).
    """
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    plain, turning, value = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    count = len(x)

    def linear(rows: Float64s, name: str) -> Float64s:
        return np.asarray(rows @ own[f"self_attn.{name}.weight"].T)

    def normed(rows: Float64s, name: str) -> Float64s:
        root = np.sqrt((rows * rows).mean(-1, keepdims=True) + EPS)
        return np.asarray(rows / root * own[f"self_attn.{name}.weight"])

    def rotated(rows: Float64s) -> Float64s:
        first, second = rows[..., : turning // 2], rows[..., turning // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    query = linear(normed(linear(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
    query = query.reshape(count, heads, plain + turning)
    shared = linear(x, "kv_a_proj_with_mqa")
    expanded = linear(normed(shared[:, :rank], "kv_a_layernorm"), "kv_b_proj")
    expanded = expanded.reshape(count, heads, plain + value)
    turned = np.broadcast_to(rotated(shared[:, None, rank:]), (count, heads, turning))
    keys = np.concatenate([expanded[..., :plain], turned], -1)
    queries = np.concatenate([query[..., :plain], rotated(query[..., plain:])], -1)

    scores = np.einsum("thd,shd->hts", queries, keys) / np.sqrt(plain + turning)
    scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hts,shd->thd", weights, expanded[..., plain:])
    return linear(attended.reshape(count, -1), "o_proj")
