"""MiniCPM-SALA: its tiny configs, the tensors of its layers, and both kinds of them in numpy.

sparse     y = W_o (attention(W_q x, W_k x, W_v x) * sigmoid(W_gate x))      no rotary embedding
lightning  q, k = RoPE(RMS(W_q x)), RoPE(RMS(W_k x))      a head at a time
           S_t = e^{-m} S_{t-1} + k_t v_t^T,  o_t = D^-1/2 q_t^T S_t,  m = 2^{-8 (h + 1) / heads}
           y = W_o (RMS(o) * sigmoid(W_z x))              all heads together
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.reference import linear_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.sparse_attention.reference import Trace, sparse_attention
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

Config = dict[str, Any]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

SPARSE, LIGHTNING = "minicpm4", "lightning-attn"
SETTINGS: Config = {
    "architectures": ["MiniCPMSALAForCausalLM"],
    "model_type": "minicpm_sala",
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "lightning_use_rope": True,
    "lightning_scale": "1/sqrt(d)",
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
}


def mixer_config(mixers: list[str], heads: int, size: int) -> Config:
    """The keys of a SALA config beyond MiniCPM's, without ``sparse_config``."""
    return {
        **SETTINGS,
        "num_hidden_layers": len(mixers),
        "mixer_types": mixers,
        "lightning_nh": heads,
        "lightning_nkv": heads,
        "lightning_head_dim": size,
    }


def mixer_tensors(
    config: Config,
    layer: int,
    matrix: Callable[[int, int, float], Float32s],
    norm: Callable[[int], Float32s],
) -> dict[str, Float32s]:
    """What a layer has besides, or instead of, MiniCPM's attention tensors."""
    hidden = config["hidden_size"]
    if config["mixer_types"][layer] == SPARSE:
        return {"self_attn.o_gate.weight": matrix(hidden, hidden, 1.5)}
    heads, size = config["lightning_nh"], config["lightning_head_dim"]
    width = heads * size
    return {
        **{f"self_attn.{name}_proj.weight": matrix(width, hidden, 1.5) for name in "qkvz"},
        "self_attn.o_proj.weight": matrix(hidden, width, 3.0),
        "self_attn.q_norm.weight": norm(size),
        "self_attn.k_norm.weight": norm(size),
        "self_attn.o_norm.weight": norm(width),
    }


def sparse_layer(config: Config, own: dict[str, Float64s], x: Float64s, trace: Trace) -> Float64s:
    """(T, hidden) in and out; ``own`` are the layer's tensors."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, count = own["self_attn.q_proj.weight"].shape[0] // heads, len(x)
    query, key, value = ((x @ own[f"self_attn.{n}_proj.weight"].T)[None].astype(np.float32) for n in "qkv")
    spec = SparseAttentionSpec(heads, kv_heads, size**-0.5, **config.get("sparse_config", {"topk": 0}))
    cache = np.zeros((1, kv_heads, count, size), np.float32)
    past = np.zeros(1, np.int64)
    output, *_ = sparse_attention(query, key, value, cache, cache, past, spec=spec, trace=trace)
    gated = output[0].astype(np.float64) * _sigmoid(x @ own["self_attn.o_gate.weight"].T)
    return np.asarray(gated @ own["self_attn.o_proj.weight"].T)


def lightning_layer(
    config: Config, own: dict[str, Float64s], x: Float64s, cos: Float64s, sin: Float64s
) -> Float64s:
    """(T, hidden) in and out; cos and sin (T, 1, D / 2)."""
    heads, size, eps = config["lightning_nh"], config["lightning_head_dim"], config["rms_norm_eps"]

    def turned(name: str) -> Float64s:
        split = (x @ own[f"self_attn.{name}_proj.weight"].T).reshape(len(x), heads, size)
        first, second = np.split(_rms(split, own[f"self_attn.{name}_norm.weight"], eps), 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    spec = LinearAttentionSpec(tuple(-(2 ** (-8 * (h + 1) / heads)) for h in range(heads)), size**-0.5)
    query, key = (turned(name).reshape(1, len(x), -1) for name in "qk")
    value = (x @ own["self_attn.v_proj.weight"].T)[None]
    output, _ = linear_attention(query, key, value, np.zeros((1, heads, size, size)), spec=spec)
    normed = _rms(output[0], own["self_attn.o_norm.weight"], eps)
    return np.asarray(
        normed * _sigmoid(x @ own["self_attn.z_proj.weight"].T) @ own["self_attn.o_proj.weight"].T
    )


def _rms(x: Float64s, weight: Float64s, eps: float) -> Float64s:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def _sigmoid(x: Float64s) -> Float64s:
    return np.asarray(1 / (1 + np.exp(-x)))
