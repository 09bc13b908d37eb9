"""Models with recurrent layers: their part of a decode step, and what a session keeps, by context."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from cpm_edge.benchmarks.context.decode import DecodeResult
from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.plugins.linear_attention.recurrent import RecurrentNorms, recurrent_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.native import ThreadPool
from cpm_edge.runtimes.cache_layout import RecurrentLayout
from cpm_edge.runtimes.openvino.native_session import OpenVinoNativeSession

ROUNDS = 3
EPSILON = 1e-6


class RecurrentProbe:
    """The recurrent layers between their products, called directly, each on a state of its own.

    Args:
        threads: of its own pool.
    """

    def __init__(self, layout: RecurrentLayout, threads: int, synthetic: Synthetic) -> None:
        heads, size = layout.heads, layout.key_size
        width = heads * size
        rng = np.random.default_rng(0)
        decay = tuple(float(-(2.0 ** (-8 * (head + 1) / heads))) for head in range(heads))
        self._spec = LinearAttentionSpec(decay, size**-0.5)
        one, wide = np.ones(size, np.float32), np.ones(width, np.float32)
        self._norms = RecurrentNorms(one, one, wide, EPSILON)
        self._mixed = rng.standard_normal((1, 4 * width), np.float32)
        angle = rng.standard_normal((1, size // 2), np.float32)
        self._rotation = np.cos(angle), np.sin(angle)
        self._states = [synthetic.state(layer) for layer in layout.layers]
        self._output = np.empty((1, width), np.float32)
        self._pool = ThreadPool(threads)

    def decode(self) -> float:
        """Seconds that all layers take for one token; the position is no argument of theirs."""
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for state in self._states:
                recurrent_attention(
                    self._pool,
                    self._spec,
                    self._norms,
                    self._mixed,
                    self._rotation,
                    state,
                    out=self._output,
                )
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def close(self) -> None:
        self._states.clear()
        self._pool.close()


def parts_table(result: DecodeResult) -> Table:
    """One token in milliseconds: the attention of both kinds of layers, and all that is left."""
    columns = ["whole token", "sparse layers' attention", "recurrent layers", "the rest"]
    table = Table("context", *columns, title="decode by part, ms")
    for context in result.contexts:
        whole = 1e3 / result.of(result.rates, "sparse", context).median
        parts = [1e3 * result.of(result.attention, row, context).median for row in ("sparse", "recurrent")]
        cells = [whole, *parts, whole - sum(parts)]
        table.add_row(str(context), *(f"{value:.2f}" for value in cells))
    return table


def kept_bytes(session: OpenVinoNativeSession) -> dict[str, int]:
    """What a session keeps at its position, without the room that its buffers have for more."""
    rows = session.cache_bytes() - session.state_bytes() - session.snapshot_bytes() - session.pooled_bytes()
    reached = session.position / session.capacity
    return {
        "keys_and_values": round(rows * reached),
        "pooled_keys": round(session.pooled_bytes() * reached),
        "states": session.state_bytes(),
        "snapshots": session.snapshot_bytes(),
    }


def kept_table(kept: Mapping[int, Mapping[str, int]], contexts: Sequence[int]) -> Table:
    """``kept_bytes`` by context."""
    columns = ["keys and values", "pooled keys", "states", "snapshots of states", "total"]
    table = Table("context", *columns, title="what a session keeps, MB")
    for context in contexts:
        values = [*kept[context].values(), sum(kept[context].values())]
        table.add_row(str(context), *(f"{value / 1e6:.2f}" for value in values))
    return table


def recurrent_note(layout: RecurrentLayout, attention: Mapping[str, Any]) -> str:
    """Why the one part does not grow and the other does."""
    return (
        f"a recurrent layer reads and writes a state of {layout.nbytes / len(layout.layers) / 1e6:.2f} MB a "
        "token, whatever the position; a sparse layer reads a pooled key for every "
        f"{attention['kernel_stride']} tokens and, from {attention['dense_len']} tokens on, at most "
        f"{attention['topk'] + attention['window_size'] // attention['block_size']} blocks of "
        f"{attention['block_size']} keys and values"
    )
