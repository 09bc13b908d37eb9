"""``cpm.MixtureOfExperts`` in torch: computed when called eagerly, one ONNX node when exported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everywhere

from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.mixture_of_experts.spec import OP, MixtureOfExpertsSpec


def mixture_of_experts(
    x: Tensor,
    router_logits: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    *,
    spec: MixtureOfExpertsSpec,
) -> Tensor:
    """Run or record the op; shapes as in ``cpm_edge.plugins.mixture_of_experts.spec``."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}",
            (x, router_logits, *w1, *w3, *w2),
            attrs={**spec.attributes()},
            dtype=x.dtype,
            shape=x.shape,
            version=VERSION,
        )
    return _eager(x, router_logits, w1, w3, w2, spec)


def _eager(
    x: Tensor,
    router_logits: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    spec: MixtureOfExpertsSpec,
) -> Tensor:
    """Expert by expert, each over the tokens that chose it."""
    rows = x.flatten(0, -2)
    order, shares = route(router_logits.flatten(0, -2), spec)
    output = torch.zeros_like(rows)
    for expert in range(spec.num_experts):
        mine = (order == expert).any(1).nonzero().squeeze(1)
        inner = F.silu(F.linear(rows[mine], w1[expert])) * F.linear(rows[mine], w3[expert])
        output.index_add_(0, mine, shares[mine, expert, None] * F.linear(inner, w2[expert]))
    return output.view(x.shape)


def route(router_logits: Tensor, spec: MixtureOfExpertsSpec) -> tuple[Tensor, Tensor]:
    """The experts that each token chose, int64 (tokens, top_k), and all shares (tokens, experts)."""
    probability = torch.softmax(router_logits, -1)
    # torch.topk leaves the order of ties open; a stable sort takes the lowest index first.
    values, order = torch.sort(probability, dim=-1, descending=True, stable=True)
    values, order = values[:, : spec.top_k], order[:, : spec.top_k]
    shares = torch.zeros_like(probability).scatter(1, order, values / values.sum(-1, keepdim=True))
    return order, shares
