"""Specification of ``cpm.MixtureOfExperts`` version 1.

    p    = softmax(router_logits) over the experts
    S    = the top_k experts of largest p, ties to the lowest index
    y    = sum over e in S of p_e / (sum of p over S) * W2_e (silu(W1_e x) * W3_e x)

Every token is routed by itself, so the result does not depend on how rows are cut into calls, apart from
rounding. Only the weights of chosen experts need to be read.

Inputs, in order (E experts, H hidden size, F intermediate size)
    x              (B, T, H)
    router_logits  (B, T, E)      float32 whatever the weights are stored in: a rounded router chooses others
    w1, E times    (F, H)         gate projections, by expert
    w3, E times    (F, H)         up projections
    w2, E times    (H, F)         down projections
Output
    y              (B, T, H)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

OP = "MixtureOfExperts"


@dataclass(frozen=True)
class MixtureOfExpertsSpec:
    """The op's attributes.

    Raises:
        ValueError: no expert is chosen, or more than there are.
    """

    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1 to num_experts ({self.num_experts}), got {self.top_k}")

    def attributes(self) -> dict[str, int]:
        """The ONNX attributes, by name."""
        return asdict(self)
