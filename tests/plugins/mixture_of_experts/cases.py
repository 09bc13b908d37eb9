"""Inputs for the op and what its definition says about them, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """Weights are lists by expert; ``expected`` computes every expert for every token and masks."""

    spec: MixtureOfExpertsSpec
    x: Array
    logits: Array
    w1: list[Array]
    w3: list[Array]
    w2: list[Array]

    @property
    def weights(self) -> tuple[list[Array], list[Array], list[Array]]:
        return self.w1, self.w3, self.w2

    def shares(self) -> Array:
        """(B, T, E), 0 for experts that are not chosen."""
        probability = np.exp(self.logits.astype(np.float64))
        rank = np.argsort(np.argsort(-probability, axis=-1, kind="stable"), axis=-1, kind="stable")
        kept = np.where(rank < self.spec.top_k, probability, 0)
        return np.asarray(kept / kept.sum(-1, keepdims=True))

    def expected(self) -> Array:
        x = self.x.astype(np.float64)
        gate = np.einsum("efh,bth->btef", np.stack(self.w1), x)
        inner = gate / (1 + np.exp(-gate)) * np.einsum("efh,bth->btef", np.stack(self.w3), x)
        return np.asarray(np.einsum("ehf,btef,bte->bth", np.stack(self.w2), inner, self.shares()))


def make_case(
    experts: int, top_k: int, rows: int, *, batch: int = 1, hidden: int = 16, wide: int = 24, seed: int = 0
) -> Case:
    """Random inputs; some tokens have tied logits, some experts get no token."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return np.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, np.float32)

    logits = (2 * rng.standard_normal((batch, rows, experts))).astype(np.float32)
    logits[:, ::3] = np.round(logits[:, ::3])
    if experts > top_k:
        logits[..., -1] = -20
    w1, w3 = ([draw(wide, hidden) for _ in range(experts)] for _ in range(2))
    w2 = [draw(hidden, wide) for _ in range(experts)]
    x = rng.standard_normal((batch, rows, hidden)).astype(np.float32)
    return Case(MixtureOfExpertsSpec(experts, top_k), x, logits, w1, w3, w2)
