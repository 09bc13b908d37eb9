"""Released shapes are traced at full size without a weight in memory."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter import trace
from cpm_edge.exporter.registry import find_architecture
from cpm_edge.runtimes.stats import peak_rss

CONFIGS = Path(__file__).parents[2] / "data/configs"


@pytest.mark.parametrize(
    ("name", "parameters", "ops"),
    [
        ("minicpm-moe-8x2b", 13.87e9, {"SparseAttention": 40, "MixtureOfExperts": 40}),
        ("minicpm-s-1b", 1.36e9, {"SparseAttention": 52, "Where": 52}),
        ("minicpm-sala", 9.48e9, {"SparseAttention": 8, "LinearAttention": 24}),
    ],
)
def test_the_real_shape_is_traced_without_weights(
    name: str, parameters: float, ops: dict[str, int], record_property: Any
) -> None:
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    entry = find_architecture(raw)
    config = entry.config.from_dict(raw)
    before, start = peak_rss(), time.perf_counter()
    graph = trace.trace(entry.model_class(), config, config.rope.table(config.max_context)).graph
    seconds, after = time.perf_counter() - start, peak_rss()
    count = Counter(node.op_type for node in graph)
    assert {op: count[op] for op in ops} == ops
    weights = [value for value in graph.initializers.values() if value.const_value is None]
    total = sum(int(np.prod(value.shape.numpy())) for value in weights if value.shape is not None)
    assert total == pytest.approx(parameters, rel=0.005)
    record_property("seconds", seconds)
    if before and after:
        record_property("rss_bytes", after)
        assert after - before < 1 << 30
