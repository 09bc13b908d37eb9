"""Released configs are read, and their models built at full size without a weight in memory."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter import eager, trace
from cpm_edge.exporter.registry import find_architecture
from cpm_edge.runtimes.stats import peak_rss

CONFIGS = Path(__file__).parents[2] / "data/configs"

# Parameters as published, or as the size of the weight files says: the latter within 0.5 %.
EXACT = {"minicpm5-1b": 1_080_632_832, "minicpm5-2b": 2_516_756_480, "smollm2-135m": 134_515_008}
ABOUT = {
    "minicpm-1b": 1.36e9,
    "minicpm-2b": 2.725e9,
    "minicpm-2b-128k": 3.01e9,
    "minicpm-2b-llama-format": 3.01e9,
    "minicpm-moe-8x2b": 13.87e9,
    "minicpm-s-1b": 1.36e9,
    "minicpm-sala": 18.95e9 / 2,
    "minicpm3-4b": 4.07e9,
    "minicpm4-0.5b": 434e6,
    "minicpm4-8b": 8.185e9,
    "minicpm4.1-8b": 8.185e9,
    "bitcpm4-1b": 1.360e9,
    "bitcpm-cann-1b": 1.622e9,
    "bitcpm-cann-3b": 3.605e9,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_the_model_has_as_many_parameters_as_published(path: Path) -> None:
    raw = json.loads(path.read_text())
    entry = find_architecture(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about keys without effect
        config = entry.config.from_dict(raw)
    model = eager.build_model(entry.model_class(), config, config.rope.table(config.max_context))
    total = sum(parameter.numel() for parameter in model.parameters())  # a shared one counts once
    if path.stem in EXACT:
        assert total == EXACT[path.stem]
    else:
        assert total == pytest.approx(ABOUT[path.stem], rel=0.005)


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("minicpm-moe-8x2b", {"SparseAttention": 40, "MixtureOfExperts": 40}),
        ("minicpm-s-1b", {"SparseAttention": 52, "Where": 52}),
        ("minicpm-sala", {"SparseAttention": 8, "LinearAttention": 24}),
    ],
)
def test_the_real_shape_is_traced_without_weights(
    name: str, ops: dict[str, int], record_property: Any
) -> None:
    """The others take as long each: cpm-bench trace does all of them."""
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
    assert total == pytest.approx(ABOUT[name], rel=0.005)
    record_property("seconds", seconds)
    if before and after:
        record_property("rss_bytes", after)
        assert after - before < 1 << 30
