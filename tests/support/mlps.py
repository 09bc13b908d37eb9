"""The MLPs beside SwiGLU: their tiny configs, tensors and numpy statements.

experts  p = softmax(W_r x), of which the largest k, renormalized: sum of p_e W2_e (silu(W1_e x) * W3_e x)
fatrelu  W_down (g * W_up x) with g = W_gate x where that is above a threshold, else 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.mixture_of_experts.reference import mixture_of_experts
from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec

Config = dict[str, Any]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


def experts_config(experts: int, chosen: int) -> Config:
    """The keys of a MiniCPM-MoE config beyond MiniCPM's."""
    return {"num_experts": experts, "num_experts_per_tok": chosen}


def fatrelu_config(threshold: float) -> Config:
    """The keys of a MiniCPM-S config beyond MiniCPM's."""
    return {"hidden_act": "fatrelu", "hidden_act_param": threshold}


def mlp_tensors(config: Config, matrix: Callable[[int, int, float], Float32s]) -> dict[str, Float32s]:
    """A layer's tensors under ``mlp.``."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    if not config.get("num_experts"):
        down = 2.0 if config["hidden_act"] == "fatrelu" else 1.0
        return {
            "gate_proj.weight": matrix(wide, hidden, 1.5),
            "up_proj.weight": matrix(wide, hidden, 1.5),
            "down_proj.weight": matrix(hidden, wide, down),
        }
    tensors = {"gate.weight": matrix(config["num_experts"], hidden, 2.0)}
    for expert in range(config["num_experts"]):
        tensors |= {
            f"experts.{expert}.w1.weight": matrix(wide, hidden, 1.5),
            f"experts.{expert}.w3.weight": matrix(wide, hidden, 1.5),
            f"experts.{expert}.w2.weight": matrix(hidden, wide, 1.5),
        }
    return tensors


def mlp(config: Config, own: dict[str, Float64s], x: Float64s) -> Float64s:
    """(T, hidden) in and out; ``own`` are the layer's tensors."""
    if config.get("num_experts"):
        spec = MixtureOfExpertsSpec(config["num_experts"], config["num_experts_per_tok"])
        weights = [
            [own[f"mlp.experts.{e}.{name}.weight"] for e in range(spec.num_experts)]
            for name in ("w1", "w3", "w2")
        ]
        return np.asarray(mixture_of_experts(x, router_logits(own, x), *weights, spec=spec))
    gate = x @ own["mlp.gate_proj.weight"].T
    if config["hidden_act"] == "fatrelu":
        passed = np.where(gate > config["hidden_act_param"], gate, 0)
    else:
        passed = gate / (1 + np.exp(-gate))
    return np.asarray(passed * (x @ own["mlp.up_proj.weight"].T) @ own["mlp.down_proj.weight"].T)


def router_logits(own: dict[str, Float64s], x: Float64s) -> Float64s:
    """(T, experts)."""
    return np.asarray(x @ own["mlp.gate.weight"].T)


def margins(config: Config, own: dict[str, Float64s], x: Float64s) -> Float64s:
    """How far each token (T,) is from another choice: of its expert, or of a gate that passes."""
    if config.get("num_experts"):
        ranked = np.sort(router_logits(own, x), 1)[:, ::-1]
        chosen = config["num_experts_per_tok"]
        return np.asarray(ranked[:, chosen - 1] - ranked[:, chosen])
    if config["hidden_act"] == "fatrelu":
        gate = x @ own["mlp.gate_proj.weight"].T
        return np.asarray(np.abs(gate - config["hidden_act_param"]).min(1))
    return np.full(len(x), np.inf)
