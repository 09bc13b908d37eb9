"""How fast: decode by the roofline ``bytes / bandwidth + layers * seconds``, prefill by operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpm_edge.benchmarks.plan.cache import read_bytes
from cpm_edge.benchmarks.plan.chip import Chip, Device
from cpm_edge.benchmarks.plan.shape import EMBEDDING, HEAD, NORM, OTHER, ModelShape

LATENT = (
    "latent attention is outside the model: the constants come from engines that keep it expanded or use "
    "other operators (published MiniCPM3-4B on the 358H: 70 to 82 % of this roofline), so it is a ceiling"
)
NO_RUNS = "no published run of this device to fit to: the ceiling that its memory bandwidth sets"
OTHER_FLAVOUR = (
    "the constants of this CPU are those of the native flavour, about twice as fast as stock operators"
)
NO_BANDWIDTH = "unverified: neither a published run nor a bandwidth is known"


@dataclass(frozen=True)
class Interval:
    """A prediction; ``low`` is None where only a ceiling is known."""

    low: float | None
    high: float

    def text(self, digits: int = 1) -> str:
        if self.low is None:
            return f"at most {self.high:.{digits}f}"
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}"


@dataclass(frozen=True)
class Decode:
    """Tokens a second at a position, and why it is not an interval where it is not."""

    rate: Interval | None
    note: str = ""


@dataclass(frozen=True)
class FirstToken:
    """Seconds to the first token of a prompt; low is the faster end."""

    seconds: Interval | None
    note: str = ""


def decode_seconds(
    weights_read: float, cache_read: float, layers: int, bandwidth: float, layer: float
) -> float:
    """One token's time in the model."""
    return (weights_read + cache_read) / bandwidth + layers * layer


def decode(
    shape: ModelShape,
    weights_read: float,
    position: int,
    form: str,
    chip: Chip,
    device: Device,
    *,
    ceiling: str = "",
) -> Decode:
    """Tokens a second with ``position`` tokens in the cache.

    Args:
        ceiling: why the constants are only an upper bound here.
    """
    cache = read_bytes(shape, position, form, chip.target)
    if device.roofline is None:
        if chip.bandwidth is None:
            return Decode(None, NO_BANDWIDTH)
        return Decode(Interval(None, chip.bandwidth.value / (weights_read + cache)), NO_RUNS)
    known = device.roofline
    rate = 1 / decode_seconds(weights_read, cache, shape.layers, known.bandwidth, known.layer)
    most = chip.bandwidth.value / (weights_read + cache) if chip.bandwidth else math.inf
    high = min(most, rate * (1 + known.spread))
    ceiling = ceiling or (LATENT if shape.is_latent and "measured here" not in known.source else "")
    if ceiling:
        return Decode(Interval(None, high), ceiling)
    return Decode(Interval(rate * (1 - known.spread), high))


def prompt_operations(shape: ModelShape, tokens: int) -> float:
    """Multiplications and additions of a prompt: weights for every token, scores and values for every pair.

    Logits are computed for the last token only.
    """
    weights = sum(m.values * m.read for m in shape.matrices if m.kind not in (EMBEDDING, HEAD, NORM, OTHER))
    head = shape.vocab_size * shape.hidden_size
    pairs = tokens * (tokens + 1) / 2
    if shape.sparse is not None and tokens > shape.sparse.dense_len:
        first, reach = shape.sparse.dense_len, shape.sparse.budget * shape.sparse.block_size
        full = max(first, min(tokens, reach))  # rows up to here have no more before them than they may read
        pooled = (pairs - first * (first + 1) / 2) / shape.sparse.kernel_stride
        pairs = full * (full + 1) / 2 + (tokens - full) * reach + pooled / 2
    width = shape.heads * shape.head_dim
    attention = 4 * width * pairs * shape.cache_layers
    states = 4 * shape.state * shape.state_layers * tokens
    return 2 * weights * tokens + 2 * head + attention + states


def first_token(shape: ModelShape, tokens: int, device: Device, *, ceiling: str = "") -> FirstToken:
    """Time to the first token of a prompt of ``tokens``; ``ceiling`` as for decode."""
    known = device.prefill
    if known is None:
        return FirstToken(None, "no published time to first token for this device")
    seconds = prompt_operations(shape, tokens) / known.rate + shape.layers * known.layer
    ceiling = ceiling or (LATENT if shape.is_latent and "measured here" not in known.source else "")
    if ceiling:
        return FirstToken(None, ceiling)
    return FirstToken(Interval(seconds / (1 + known.spread), seconds / (1 - known.spread)))
