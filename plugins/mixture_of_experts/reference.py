"""Numpy statement of ``cpm.MixtureOfExperts``: one token at a time, in the precision of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec

Array = npt.NDArray[Any]


def mixture_of_experts(
    x: Array,
    router_logits: Array,
    w1: Sequence[Array],
    w3: Sequence[Array],
    w2: Sequence[Array],
    *,
    spec: MixtureOfExpertsSpec,
) -> Array:
    """Run the op; shapes as in ``spec``, all float32 or all float64."""
    rows, logits = x.reshape(-1, x.shape[-1]), router_logits.reshape(-1, spec.num_experts)
    output = np.zeros_like(rows)
    for row, logit, total in zip(rows, logits, output, strict=True):
        for expert, share in route(logit, spec.top_k):
            gate = w1[expert] @ row
            total += share * (w2[expert] @ (gate / (1 + np.exp(-gate)) * (w3[expert] @ row)))
    return output.reshape(x.shape)


def route(logits: Array, top_k: int) -> list[tuple[int, float]]:
    """The chosen experts of one token, most probable first, and their shares; logits (E,)."""
    probability = np.exp(logits - logits.max())
    chosen = np.argsort(-probability, kind="stable")[:top_k]
    return [(int(e), probability[e] / probability[chosen].sum()) for e in chosen]
