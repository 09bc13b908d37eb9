"""Specification of ``cpm.LinearAttention`` version 1.

    S_t = e^g S_{t-1} + k_t v_t^T        one state S (D, Dv) and one log decay g <= 0 a head
    o_t = scale * q_t^T S_t              the current token is not decayed

The contract of LinearAttention in ai.onnx 27 and com.microsoft with update_rule "gated", with as many key and
value heads as query heads, the state always given, and a decay that depends on the head alone. Theirs is an
input (B, T, H); ours is an attribute of H numbers, because it never changes: the graph needs no tensor for it
and kernels read it once. Everything is float32.

Inputs, in order (T new rows, H heads)
    query       (B, T, H * D)
    key         (B, T, H * D)
    value       (B, T, H * Dv)
    past_state  (B, H, D, Dv)      zeros before the first token
Outputs
    output         (B, T, H * Dv)
    present_state  (B, H, D, Dv)   in place where an engine can
Attributes
    decay  (H,) natural logarithms, 0 or less; H is the number of heads
    scale  of the output

The result does not depend on how rows are cut into calls, apart from rounding. Padding must not reach the op:
every row enters the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OP = "LinearAttention"


@dataclass(frozen=True)
class LinearAttentionSpec:
    """The op's attributes.

    Raises:
        ValueError: no heads, a decay that is not a number or above 0, or a scale that is not finite.
    """

    decay: tuple[float, ...]
    scale: float

    def __post_init__(self) -> None:
        if not self.decay:
            raise ValueError("decay: expected one logarithm a head, got none")
        for head, decay in enumerate(self.decay):
            if not -math.inf < decay <= 0:
                raise ValueError(f"decay: expected finite logarithms, 0 or less, got {decay} for head {head}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: expected a finite number, got {self.scale}")

    @property
    def num_heads(self) -> int:
        return len(self.decay)

    def attributes(self) -> dict[str, float | list[float]]:
        """The ONNX attributes, by name."""
        return {"decay": list(self.decay), "scale": self.scale}
