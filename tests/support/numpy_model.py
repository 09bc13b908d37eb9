"""The models in numpy, written from their equations and independent of the exporter.

    h0 = E[ids] * scale_emb
    h  = h + Attn(RMS(h)) * r        r = scale_depth / sqrt(layers)
    h  = h + MLP(RMS(h)) * r
    logits = W_lm (RMS(h) / (hidden_size / dim_model_base))

Llama has none of the scales; the attention of MiniCPM3 is in numpy_latent. RoPE pairs the halves of a head;
LongRoPE divides the frequencies by a list and multiplies cos and sin by sqrt(1 + ln s / ln original),
s = max_position / original. All in float64, but the attention, whose reference is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.sparse_attention.reference import Trace, sparse_attention
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.support import mlps, sala
from tests.support.numpy_latent import latent_attention

Float64s = npt.NDArray[np.float64]

NEAR_TIE = 1e-6
NEAR_CHOICE = 1e-5


@dataclass
class NumpyRun:
    """Results of one prompt.

    Attributes:
        logits: float64 (T, vocab).
        traces: what each layer's attention selected, and by which margin.
        margins: how far each position (T,) is from another choice in a layer's MLP.
    """

    logits: Float64s
    traces: list[Trace] = field(default_factory=list)
    margins: list[Float64s] = field(default_factory=list)

    def near_ties(self) -> list[tuple[int, int]]:
        """(layer, position) of each choice that rounding may turn.

        Of blocks: a gap above 0 and below 1e-6; in the MLP: a margin below 1e-5.
        """
        blocks = [
            (layer, position)
            for layer, trace in enumerate(self.traces)
            for (_, _, position), gap in trace.gaps.items()
            if 0 < gap < NEAR_TIE
        ]
        mlps = [
            (layer, int(position))
            for layer, margins in enumerate(self.margins)
            for position in np.flatnonzero(margins < NEAR_CHOICE)
        ]
        return blocks + mlps

    def count(self) -> dict[str, int]:
        """How many rows chose their blocks, exact ties among them, and near-ties."""
        gaps = [gap for trace in self.traces for gap in trace.gaps.values()]
        return {
            "selections": sum(len(trace.selected) for trace in self.traces),
            "over_budget": len(gaps),
            "exact_ties_included": sum(gap == 0 for gap in gaps),
            "near_ties_found": len(self.near_ties()),
        }


def run(
    config: dict[str, Any], tensors: dict[str, npt.NDArray[np.float32]], ids: npt.NDArray[np.int64]
) -> NumpyRun:
    """Logits at every position of one prompt.

    Args:
        config: the raw config.json.
        tensors: by checkpoint name.
        ids: (T,) token ids.
    """
    is_minicpm = "scale_emb" in config
    layers, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    branch = config["scale_depth"] / sqrt(layers) if is_minicpm else 1.0
    cos, sin = _rotation(config, len(ids))
    weight = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    result = NumpyRun(np.empty(0))

    hidden = weight["model.embed_tokens.weight"][ids] * (config["scale_emb"] if is_minicpm else 1.0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weight.items() if n.startswith(prefix)}
        trace = Trace()
        normed = _rms(hidden, own["input_layernorm.weight"], eps)
        if "kv_lora_rank" in config:
            attended = latent_attention(config, own, normed, cos, sin)
        else:
            attended = _attention(config, own, normed, cos, sin, trace)
        hidden = hidden + branch * attended
        normed = _rms(hidden, own["post_attention_layernorm.weight"], eps)
        hidden = hidden + branch * mlps.mlp(config, own, normed)
        result.traces.append(trace)
        result.margins.append(mlps.margins(config, own, normed))
    final = _rms(hidden, weight["model.norm.weight"], eps)
    if is_minicpm:
        final = final / (config["hidden_size"] / config["dim_model_base"])
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    result.logits = final @ weight[head].T
    return result


def _rms(x: Float64s, weight: Float64s, eps: float) -> Float64s:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def _attention(
    config: dict[str, Any],
    own: dict[str, Float64s],
    x: Float64s,
    cos: Float64s,
    sin: Float64s,
    trace: Trace,
) -> Float64s:
    if "self_attn.z_proj.weight" in own:
        return sala.lightning_layer(config, own, x, cos, sin)
    if "self_attn.o_gate.weight" in own:
        return sala.sparse_layer(config, own, x, trace)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = own["self_attn.q_proj.weight"].shape[0] // heads
    count = len(x)

    def rotated(name: str, rows: int) -> npt.NDArray[np.float32]:
        split = (x @ own[f"self_attn.{name}.weight"].T).reshape(count, rows, size)
        first, second = split[..., : size // 2], split[..., size // 2 :]
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.reshape(1, count, -1).astype(np.float32)

    spec = SparseAttentionSpec(heads, kv_heads, size**-0.5, **config.get("sparse_config", {"topk": 0}))
    cache = np.zeros((1, kv_heads, count, size), np.float32)
    value = (x @ own["self_attn.v_proj.weight"].T)[None].astype(np.float32)
    output, *_ = sparse_attention(
        rotated("q_proj", heads),
        rotated("k_proj", kv_heads),
        value,
        cache,
        cache,
        np.zeros(1, np.int64),
        spec=spec,
        trace=trace,
    )
    return np.asarray(output[0].astype(np.float64) @ own["self_attn.o_proj.weight"].T)


def _rotation(config: dict[str, Any], count: int) -> tuple[Float64s, Float64s]:
    """cos and sin (T, 1, size / 2) of the rotated part of a head, for the longest context."""
    size = (
        config.get("lightning_head_dim")
        or config.get("qk_rope_head_dim")
        or config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"]
    )
    theta, longest = config.get("rope_theta", 1e4), config["max_position_embeddings"]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    divisor, factor = np.ones(size // 2), 1.0
    if kind == "dynamic":
        context = longest * scaling["factor"]
        stretch = scaling["factor"] * context / longest - (scaling["factor"] - 1)
        theta = theta * stretch ** (size / (size - 2))
    elif kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        divisor = np.array(scaling["long_factor" if longest > original else "short_factor"])
        factor = sqrt(1 + log(longest / original) / log(original)) if longest > original else 1.0
    frequency = theta ** (-np.arange(0, size, 2) / size) / divisor
    angle = (np.arange(count)[:, None] * frequency)[:, None]
    return np.cos(angle) * factor, np.sin(angle) * factor
