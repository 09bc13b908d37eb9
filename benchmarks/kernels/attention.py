"""The attention kernel, sparse and dense: time, operations and bytes against the machine's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cpm_edge.benchmarks.context.attention import AttentionProbe
from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.samples import Samples, ratio
from cpm_edge.benchmarks.token_bytes import cache_bytes, read_rows
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from cpm_edge.runtimes.openvino.native_session import PREFILL_CHUNK


def operations(spec: SparseAttentionSpec, head_size: int, position: int) -> int:
    """float32 operations that the definition asks for one query position in one layer.

    A product of queries and keys and one of weights and values over the rows that are attended to, and, for a
    sparse row, the scores of every pooled key. A multiply-add counts as two; softmax and selection are not
    counted.
    """
    rows, windows = read_rows(spec, position)
    return spec.num_heads * 2 * head_size * (2 * rows + windows)


@dataclass
class AttentionResult:
    """Seconds of all layers at one context.

    Attributes:
        decode: one token after ``context`` rows; prefill: the last ``chunk`` rows of ``context``.
    """

    context: int
    chunk: int
    layers: int
    decode: dict[str, Samples] = field(default_factory=lambda: {"sparse": Samples(), "dense": Samples()})
    prefill: dict[str, Samples] = field(default_factory=lambda: {"sparse": Samples(), "dense": Samples()})

    def decode_bytes(self, spec: SparseAttentionSpec, head_size: int) -> int:
        return self.layers * cache_bytes(spec, head_size, self.context)

    def prefill_operations(self, spec: SparseAttentionSpec, head_size: int) -> int:
        positions = range(self.context - self.chunk, self.context)
        return self.layers * sum(operations(spec, head_size, position) for position in positions)


def measure_attention(
    spec: SparseAttentionSpec,
    head_size: int,
    layers: int,
    contexts: Sequence[int],
    limits: Limits,
    *,
    repeat: int,
    progress: Progress,
) -> list[AttentionResult]:
    """Sparse and dense in turn, at each context."""
    capacity = max(contexts) + 1
    with progress.stage("drawing keys and values"):
        synthetic = Synthetic(spec.kv_num_heads, capacity, head_size)
        probe = AttentionProbe(spec, head_size, layers, capacity, limits.threads, synthetic)
    found = [AttentionResult(context, min(PREFILL_CHUNK, context), layers) for context in contexts]
    try:
        for number in range(1, repeat + 1):
            limits.sample()
            for each in found:
                for row in ("sparse", "dense"):
                    with progress.stage(f"{number} of {repeat}: attention at {each.context}, {row}"):
                        _measure(probe, each, row)
    finally:
        probe.close()
    return found


def _measure(probe: AttentionProbe, result: AttentionResult, row: str) -> None:
    dense, first = row == "dense", result.context - result.chunk
    result.decode[row].add(probe.decode(result.context, dense=dense))
    result.prefill[row].add(probe.prefill(first, result.context, PREFILL_CHUNK, dense=dense))


def attention_tables(
    results: Sequence[AttentionResult], spec: SparseAttentionSpec, head_size: int, limits: Limits
) -> list[Table]:
    """Decode against the bandwidth, prefill against the multiply-add peak."""
    specs = {"sparse": spec, "dense": dense_of(spec)}
    columns = [title for row in specs for title in (f"{row}, ms", "GB/s", "of bandwidth")]
    decode = Table("context", *columns, "dense / sparse", title="attention of all layers, one token")
    columns = [title for row in specs for title in (f"{row}, ms", "GFLOP/s", "of peak")]
    title = "attention of all layers, a chunk of prefill"
    prefill = Table("end of prompt", "rows", *columns, "dense / sparse", title=title)
    for each in results:
        cells = []
        for row, its in specs.items():
            rate = each.decode_bytes(its, head_size) / each.decode[row].median
            cells += [_ms(each.decode[row]), f"{rate / 1e9:.1f}", f"{rate / limits.bandwidth.median:.0%}"]
        decode.add_row(str(each.context), *cells, ratio(each.decode["dense"], each.decode["sparse"]))
        cells = []
        for row, its in specs.items():
            rate = each.prefill_operations(its, head_size) / each.prefill[row].median
            cells += [_ms(each.prefill[row]), f"{rate / 1e9:.0f}", f"{rate / limits.flops:.0%}"]
        last = ratio(each.prefill["dense"], each.prefill["sparse"])
        prefill.add_row(str(each.context), str(each.chunk), *cells, last)
    return [decode, prefill]


def attention_json(
    results: Sequence[AttentionResult], spec: SparseAttentionSpec, head_size: int
) -> list[dict[str, Any]]:
    """Raw seconds, and what the definition reads and computes."""
    return [
        {
            "context": each.context,
            "chunk": each.chunk,
            "layers": each.layers,
            **{
                row: {
                    "decode_seconds": each.decode[row].values,
                    "decode_bytes": each.decode_bytes(its, head_size),
                    "prefill_seconds": each.prefill[row].values,
                    "prefill_operations": each.prefill_operations(its, head_size),
                }
                for row, its in (("sparse", spec), ("dense", dense_of(spec)))
            },
        }
        for each in results
    ]


def dense_of(spec: SparseAttentionSpec) -> SparseAttentionSpec:
    """The dense attention of the same heads."""
    return SparseAttentionSpec.dense(spec.num_heads, spec.kv_num_heads, spec.scale)


def _ms(samples: Samples) -> str:
    return Samples(1e3 * value for value in samples.values).text(2)
