"""Weight matrices for property tests: ordinary rows mixed with the awkward ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Floats = npt.NDArray[np.float32]

KINDS = ("normal", "zero", "constant", "negative", "positive", "tiny", "denormal", "huge", "outlier")


def row_of(kind: str, cols: int, rng: np.random.Generator) -> Floats:
    """One float32 row (cols,) of a kind from KINDS; huge stays within the scales float16 holds."""
    row = rng.standard_normal(cols).astype(np.float32)
    if kind == "zero":
        row[:] = 0
    elif kind == "constant":
        row[:] = row[0]
    elif kind == "negative":
        row = -np.abs(row)
    elif kind == "positive":
        row = np.abs(row)
    elif kind == "tiny":
        row *= np.float32(1e-7)
    elif kind == "denormal":
        row *= np.float32(1e-44)
    elif kind == "huge":
        row *= np.float32(60000 / max(1.0, float(np.abs(row).max())))
    elif kind == "outlier":
        row[rng.integers(cols)] *= np.float32(1000)
    return row


@st.composite
def weights(draw: st.DrawFn, cols: int | None = None) -> Floats:
    """float32 (1..9, cols), each row of its own kind; cols is a multiple of 4 unless given."""
    width = cols if cols is not None else 4 * draw(st.integers(1, 48))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.stack([row_of(kind, width, rng) for kind in kinds])


@st.composite
def weights_and_group(draw: st.DrawFn) -> tuple[Floats, int]:
    """A matrix and any divisor of its columns, odd ones included."""
    weight = draw(weights())
    cols = weight.shape[1]
    return weight, draw(st.sampled_from([size for size in range(1, cols + 1) if cols % size == 0]))
