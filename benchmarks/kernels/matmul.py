"""Products with packed weights: one row against the read bandwidth, many against the multiply-add peak."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.samples import Samples
from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.matmul_nbits.native import MatmulCall
from cpm_edge.plugins.matmul_nbits.panels import pack_rows
from cpm_edge.plugins.matmul_nbits.reference import dequantize
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import ThreadPool

# Copies of a matrix that one round walks through, so that it comes from memory and not from a cache.
WALK_BYTES = 256 << 20
ACCURACY_ROWS = 16


@dataclass(frozen=True)
class Format:
    """A packed format, by the attributes of NBitsShape."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def label(self) -> str:
        name = {2: "ternary", 4: "int4", 8: "int8"}[self.bits]
        group = f"g{self.group}" if self.group else "row"
        return f"{name} {group}{'' if self.symmetric else ' asym'}"


LINEAR = (
    *(Format(4, group, symmetric) for symmetric in (True, False) for group in (32, 64, 128)),
    Format(2, 128),
    Format(8, 0),
)
HEAD = (Format(8, 0),)


@dataclass
class MatmulResult:
    """One matrix in one format.

    Attributes:
        bytes: of the packed matrix.
        seconds: of one row, a copy after the other; rows_seconds: of ``rows`` rows.
        error: norm of the difference to the dequantized float32 product, relative to its norm.
    """

    matrix: str
    shape: NBitsShape
    format: Format
    bytes: int
    rows: int
    error: float = 0.0
    seconds: Samples = field(default_factory=Samples)
    rows_seconds: Samples = field(default_factory=Samples)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the one-row product."""
        return self.bytes / self.seconds.median

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds a second of the product with ``rows`` rows."""
        return self.rows * self.shape.rows * self.shape.cols / self.rows_seconds.median

    def to_json(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix,
            "rows": self.shape.rows,
            "cols": self.shape.cols,
            "format": self.format.label,
            "bytes": self.bytes,
            "error": self.error,
            "gemv_seconds": self.seconds.values,
            "gemm_rows": self.rows,
            "gemm_seconds": self.rows_seconds.values,
        }


def matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The products of a model as the native graph has them: name to (rows, columns)."""
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q, k and v": (wide + 2 * narrow, config.hidden_size),
        "o": (config.hidden_size, wide),
        "gate or up": (config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }


def random_panels(shape: NBitsShape, seed: int = 0) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Packed random weights, and the same dequantized."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3 if shape.bits == 2 else 1 << shape.bits, (shape.rows, shape.cols), np.uint8)
    scales = rng.uniform(0.5, 1.5, (shape.rows, shape.groups)).astype(np.float16)
    zeros = None if shape.symmetric else rng.integers(4, 12, scales.shape).astype(np.uint8)
    packed = pack_rows(shape, codes, scales, zeros).reshape(-1)
    return packed, dequantize(shape, codes, scales, zeros)


class MatmulBench:
    """One matrix in one format, as many copies of it as a cache cannot hold.

    Args:
        walk_bytes: of all copies together.
    """

    def __init__(
        self, result: MatmulResult, pool: ThreadPool, panels: npt.NDArray[np.uint8], walk_bytes: int
    ) -> None:
        rng = np.random.default_rng(1)
        shape = result.shape
        self.result = result
        copies = [panels, *(panels.copy() for _ in range(walk_bytes // len(panels)))]
        one, many = (rng.standard_normal((rows, shape.cols), np.float32) for rows in (1, result.rows))
        self._walk = [MatmulCall(pool, shape, copy, one) for copy in copies]
        self._many = MatmulCall(pool, shape, panels, many)
        self._walk[0]()
        self._many()

    def round(self) -> None:
        """One sample of each."""
        start = time.perf_counter()
        for call in self._walk:
            call()
        self.result.seconds.add((time.perf_counter() - start) / len(self._walk))
        start = time.perf_counter()
        self._many()
        self.result.rows_seconds.add(time.perf_counter() - start)


def error_of(pool: ThreadPool, shape: NBitsShape, panels: npt.NDArray[np.uint8], weight: Any) -> float:
    """|kernel - dequantized product| / |dequantized product|: what int8 activations cost."""
    x = np.random.default_rng(2).standard_normal((ACCURACY_ROWS, shape.cols), np.float32)
    call = MatmulCall(pool, shape, panels, x)
    call()
    expected = x @ weight.T
    return float(np.linalg.norm(call.output - expected) / np.linalg.norm(expected))


def measure_matmul(
    config: LlamaConfig, limits: Limits, *, rows: int, repeat: int, progress: Progress
) -> list[MatmulResult]:
    """Every matrix of the model in every format that its columns allow; int8 rows allow any."""
    found = []
    with ThreadPool(limits.threads) as pool:
        for matrix, (height, width) in matrices(config).items():
            for format_ in HEAD if matrix == "head" else LINEAR:
                if format_.group and width % format_.group:
                    continue
                with progress.stage(f"{matrix}, {format_.label}"):
                    shape = NBitsShape(height, width, format_.bits, format_.group, format_.symmetric)
                    found.append(_measure(matrix, shape, format_, pool, limits, rows, repeat))
    return found


def _measure(
    matrix: str,
    shape: NBitsShape,
    format_: Format,
    pool: ThreadPool,
    limits: Limits,
    rows: int,
    repeat: int,
) -> MatmulResult:
    panels, weight = random_panels(shape)
    result = MatmulResult(matrix, shape, format_, len(panels), rows, error_of(pool, shape, panels, weight))
    del weight
    bench = MatmulBench(result, pool, panels, WALK_BYTES)
    for _ in range(repeat):
        bench.round()
    limits.sample()
    return result


def matmul_table(results: Sequence[MatmulResult], limits: Limits) -> Table:
    rows = results[0].rows
    table = Table(
        *["matrix", "rows x columns", "format", "MB", "1 row, GB/s", "of bandwidth"],
        *[f"{rows} rows, GMAC/s", "of float32 peak", "relative error"],
        title="products with packed weights",
    )
    for each in results:
        table.add_row(
            each.matrix,
            f"{each.shape.rows} x {each.shape.cols}",
            each.format.label,
            f"{each.bytes / 1e6:.2f}",
            Samples(each.bytes / seconds / 1e9 for seconds in each.seconds.values).text(),
            f"{each.bandwidth / limits.bandwidth.median:.0%}",
            f"{each.multiply_adds / 1e9:.1f}",
            f"{each.multiply_adds / limits.multiply_adds.median:.0%}",
            f"{each.error:.2%}",
        )
    return table
