"""LinearAttention beside ONNX Runtime's com.microsoft op of the same contract, and its decode by position."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.samples import Samples, ratio
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.linear_attention.native import linear_attention
from cpm_edge.plugins.linear_attention.spec import OP, LinearAttentionSpec
from cpm_edge.plugins.native import ThreadPool

Floats = npt.NDArray[np.float32]
CHUNK = 512
KERNEL_CHUNK = 48  # kLinearChunk of plugins/csrc/kernels/linear_attention.h
DECODES = 20  # steps of one sample, each on a state of its own


@dataclass
class LinearAttentionResult:
    """Seconds by implementation.

    Attributes:
        prefill: of ``rows`` rows, by "ours" and "onnxruntime".
        decode: of one row, ours, by the number of rows before it.
    """

    heads: int
    size: int
    rows: int
    prefill: dict[str, Samples] = field(default_factory=dict)
    decode: dict[int, Samples] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """float32 operations of the recurrence over ``rows`` rows: state update and output, two each."""
        return 4 * self.rows * self.heads * self.size * self.size

    @property
    def operations_in_chunks(self) -> int:
        """The same with the two products within a chunk, of which only pairs of causal rows are counted."""
        whole, rest = divmod(self.rows, KERNEL_CHUNK)
        pairs = whole * KERNEL_CHUNK * (KERNEL_CHUNK + 1) // 2 + rest * (rest + 1) // 2
        return self.operations + 4 * pairs * self.heads * self.size

    def least(self, limits: Limits) -> dict[str, Samples]:
        """Seconds below which the prefill cannot be while every operation is a multiply-add at the peak."""
        counted = {
            "least at the peak, products with the state": self.operations,
            f"least at the peak, in chunks of {KERNEL_CHUNK} rows": self.operations_in_chunks,
        }
        return {name: Samples([operations / limits.flops]) for name, operations in counted.items()}

    def table(self, limits: Limits) -> Table:
        table = Table("", "rows", "ms", "GFLOP/s", "of peak", "ours is faster by",
                      title=f"linear attention, {self.heads} heads of {self.size}")  # fmt: skip
        for row, samples in {**self.prefill, **self.least(limits)}.items():
            rate = self.operations / samples.median
            cells = [f"{rate / 1e9:.0f}", f"{rate / limits.flops:.0%}", ratio(samples, self.prefill["ours"])]
            table.add_row(row, str(self.rows), _ms(samples), *cells)
        return table

    def decode_table(self, limits: Limits) -> Table:
        first = next(iter(self.decode.values()))
        moved = 2 * 4 * self.heads * self.size * self.size  # the state, read and written
        title = "linear attention, one row"
        table = Table("after", "ms", "GB/s read and written", "of the first", title=title)
        for position, samples in self.decode.items():
            cells = [_ms(samples, 3), f"{moved / samples.median / 1e9:.1f}", ratio(samples, first)]
            table.add_row(f"{position} rows", *cells)
        return table

    def to_json(self) -> dict[str, Any]:
        return {
            "heads": self.heads,
            "size": self.size,
            "rows": self.rows,
            "prefill_seconds": {row: samples.values for row, samples in self.prefill.items()},
            "decode_seconds": {str(position): samples.values for position, samples in self.decode.items()},
        }


def sala_spec(heads: int, size: int) -> LinearAttentionSpec:
    """SALA's constant decays."""
    decays = tuple(float(-(2.0 ** (-8 * (head + 1) / heads))) for head in range(heads))
    return LinearAttentionSpec(decays, size**-0.5)


def onnxruntime_call(spec: LinearAttentionSpec, threads: int, *tensors: Floats) -> Callable[[], object]:
    """com.microsoft LinearAttention, update_rule "gated", of query, key, value (1, T, H * D) and state."""
    import onnx_ir as ir
    import onnxruntime

    names = ("query", "key", "value", "past_state", "decay")
    inputs = [
        ir.Value(
            name=name,
            shape=ir.Shape([None] * (4 if name == "past_state" else 3)),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for name in names
    ]
    attributes: dict[str, Any] = {
        "q_num_heads": spec.num_heads,
        "kv_num_heads": spec.num_heads,
        "update_rule": "gated",
        "scale": spec.scale,
    }
    node = ir.Node("com.microsoft", OP, inputs, ir.convenience.convert_attributes(attributes), num_outputs=2)
    for value, name in zip(node.outputs, ("output", "present_state"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    imports = {"": 21, "com.microsoft": 1}
    graph = ir.Graph(inputs, list(node.outputs), nodes=[node], opset_imports=imports, name="op")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    decay = np.tile(np.asarray(spec.decay, np.float32), (1, tensors[0].shape[1], 1))
    feeds = dict(zip(names, (*tensors, decay), strict=True))
    return lambda: session.run(None, feeds)


def measure_linear_attention(
    limits: Limits,
    *,
    heads: int,
    size: int,
    rows: int,
    positions: Sequence[int],
    repeat: int,
    progress: Progress,
) -> LinearAttentionResult:
    """Prefill in turn with ONNX Runtime, then decode after each of ``positions`` rows, which really run."""
    spec = sala_spec(heads, size)
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, rows, heads * size), np.float32)
    state = np.zeros((1, heads, size, size), np.float32)
    result = LinearAttentionResult(heads, size, rows)
    with ThreadPool(limits.threads) as pool:
        out = np.empty((1, rows, heads * size), np.float32)
        runs: dict[str, Callable[[], object]] = {
            # In place: the decays keep a state that is fed the same rows again and again finite.
            "ours": lambda: linear_attention(pool, spec, query, key, value, state, out=out),
            "onnxruntime": onnxruntime_call(spec, limits.threads, query, key, value, state.copy()),
        }
        for number in range(repeat + 1):
            with progress.stage(f"{number} of {repeat}: linear attention, {rows} rows"):
                for row, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if number:  # the first is the warm-up
                        result.prefill.setdefault(row, Samples()).add(time.perf_counter() - start)
            limits.sample()
        _measure_decode(result, pool, spec, positions, repeat, progress)
    return result


def _measure_decode(
    result: LinearAttentionResult,
    pool: ThreadPool,
    spec: LinearAttentionSpec,
    positions: Sequence[int],
    repeat: int,
    progress: Progress,
) -> None:
    rng = np.random.default_rng(1)
    width = result.heads * result.size
    chunk = rng.standard_normal((3, 1, CHUNK, width), np.float32)
    row = np.ascontiguousarray(chunk[:, :, :1])
    state = np.zeros((1, result.heads, result.size, result.size), np.float32)
    reached, states = 0, {}
    for position in sorted(positions):
        with progress.stage(f"linear attention up to {position} rows"):
            while reached < position:
                count = min(CHUNK, position - reached)
                query, key, value = (each[:, :count] for each in chunk)
                linear_attention(pool, spec, query, key, value, state)
                reached += count
        # As many as a model has layers: they come from memory, as in a model.
        states[position] = [state.copy() for _ in range(DECODES)]
        result.decode[position] = Samples()
    out = np.empty((1, 1, width), np.float32)
    for _ in range(repeat):
        for position, copies in states.items():
            start = time.perf_counter()
            for each in copies:
                linear_attention(pool, spec, row[0], row[1], row[2], each, out=out)
            result.decode[position].add((time.perf_counter() - start) / DECODES)


def _ms(samples: Samples, digits: int = 1) -> str:
    return Samples(1e3 * value for value in samples.values).text(digits)
