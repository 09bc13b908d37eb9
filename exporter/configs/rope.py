"""Rotary position embedding: reading ``rope_scaling`` and fixing it for one context length.

Length-dependent variants (dynamic NTK, LongRoPE) are resolved once, for the context the bundle is built
for: keys already in a cache cannot be rotated again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.errors import ConfigError

IMPLEMENTED = ("default", "linear", "dynamic", "longrope")


@dataclass(frozen=True)
class RopeTable:
    """What a graph needs: angle(position, i) = position * inv_freq[i], cos and sin times ``scaling``.

    Attributes:
        inv_freq: float32 (head_dim / 2,).
        scaling: factor on cos and sin.
        note: how the choice was made, for the manifest and the model card.
    """

    inv_freq: np.ndarray
    scaling: float
    note: str


@dataclass(frozen=True)
class Rope:
    """``rope_theta`` and ``rope_scaling`` (or ``rope_parameters``) of a config.

    Attributes:
        theta: base of the frequencies.
        kind: one of IMPLEMENTED.
        factor: of linear and dynamic scaling.
        long_factor, short_factor: LongRoPE divisors, (head_dim / 2,) each.
        original_max: context the unscaled frequencies were trained for.
        attention_factor: LongRoPE factor on cos and sin, None for the published formula.
    """

    theta: float
    kind: str
    head_dim: int
    max_position: int
    factor: float = 1.0
    long_factor: tuple[float, ...] = ()
    short_factor: tuple[float, ...] = ()
    original_max: int = 0
    attention_factor: float | None = None

    @classmethod
    def read(cls, reader: ConfigReader, head_dim: int, max_position: int) -> Rope:
        """Read both spellings that Hugging Face configs use; an unknown key in either is refused."""
        scaling = reader.section("rope_scaling") or reader.section("rope_parameters")
        reader.skip("rope_parameters")
        theta = reader.positive_number("rope_theta", 10000.0)
        if scaling is None:
            return cls(head_dim=head_dim, max_position=max_position, theta=theta, kind="default")
        theta = scaling.positive_number("rope_theta", theta)
        scaling.only("partial_rotary_factor", (1.0,), 1.0)
        legacy = scaling.get("type", str, "default")
        kind = scaling.only("rope_type", IMPLEMENTED, legacy)
        fields: dict[str, Any] = {}
        if kind in ("linear", "dynamic"):
            fields["factor"] = scaling.positive_number("factor")
        elif kind == "longrope":
            half = head_dim // 2
            fields["long_factor"] = scaling.numbers("long_factor", half)
            fields["short_factor"] = scaling.numbers("short_factor", half)
            original = reader.get("original_max_position_embeddings", int, max_position)
            fields["original_max"] = scaling.positive("original_max_position_embeddings", original)
            if fields["original_max"] < 2:
                key = scaling.name("original_max_position_embeddings")
                raise ConfigError(f"{key}: expected at least 2, got 1")
            fields["factor"] = scaling.positive_number("factor", max_position / fields["original_max"])
            fields["attention_factor"] = (
                scaling.positive_number("attention_factor")
                if scaling.get("attention_factor", float, None) is not None
                else None
            )
        scaling.finish(strict=True)
        return cls(head_dim=head_dim, max_position=max_position, theta=theta, kind=kind, **fields)

    @property
    def longest(self) -> int:
        """Positions that the scaling was made for."""
        return int(self.max_position * self.factor) if self.kind == "dynamic" else self.max_position

    def table(self, max_context: int) -> RopeTable:
        """The frequencies for a bundle that holds ``max_context`` tokens."""
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        theta = self.theta
        divisor = np.ones((), np.float32)
        scaling = 1.0
        note = self.kind
        if self.kind == "linear":
            divisor = np.asarray(self.factor, np.float32)
        elif self.kind == "dynamic" and max_context > self.max_position:
            stretch = self.factor * max_context / self.max_position - (self.factor - 1)
            theta *= stretch ** (self.head_dim / (self.head_dim - 2))
            note = f"dynamic NTK, base {theta:.6g} for {max_context} tokens"
        elif self.kind == "longrope":
            is_long = max_context > self.original_max
            divisor = np.asarray(self.long_factor if is_long else self.short_factor, np.float32)
            scaling = self._longrope_scaling()
            note = f"LongRoPE, {'long' if is_long else 'short'} list for {max_context} tokens"
        inv_freq = (np.float32(1.0) / (divisor * np.float32(theta) ** exponent)).astype(np.float32)
        return RopeTable(inv_freq, scaling, note)

    def _longrope_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max))
