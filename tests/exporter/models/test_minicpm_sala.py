"""MiniCPM-SALA's modules: any chunking gives the same rows, and the real shape traces without weights."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpm_edge.exporter import eager, trace
from cpm_edge.exporter.configs import MiniCPMSALAConfig
from cpm_edge.exporter.models import minicpm_sala
from cpm_edge.runtimes.stats import peak_rss
from tests.support.checkpoints import VARIANTS, make_tensors, prompt

RELEASED = Path(__file__).parents[2] / "data/configs/minicpm-sala.json"
IDS = prompt(200)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["sala", "sala-dense"])
def test_chunks_steps_and_streamed_layers_are_the_whole_prompt(variant: str) -> None:
    config = MiniCPMSALAConfig.from_dict(VARIANTS[variant])
    table = config.rope.table(config.max_context)
    weights = make_tensors(VARIANTS[variant]) | {"rotary.inv_freq": table.inv_freq}
    model: Any = eager.build_model(minicpm_sala.Model, config, table)
    eager.load_weights(model, "", weights.__getitem__, config.tie_word_embeddings)

    ids, past = torch.from_numpy(IDS)[None], torch.zeros(1, dtype=torch.int64)
    expected, presents = model(ids, past, eager.empty_caches(config, len(IDS)))
    caches, rows = eager.empty_caches(config, len(IDS)), []
    for start, stop in ((0, 1), (1, 34), (34, 199), (199, 200)):
        logits, caches = model(ids[:, start:stop], past + start, caches)
        rows.append(logits)
    np.testing.assert_allclose(torch.cat(rows, 1).numpy(), expected.numpy(), atol=1e-4)

    run = eager.run_streamed(minicpm_sala.Model, config, table, weights.__getitem__, IDS.tolist())
    np.testing.assert_allclose(run.logits, expected[0].numpy(), atol=1e-5)
    for layer, (mark, whole, pieces) in enumerate(zip(run.keys, presents, caches, strict=True)):
        shape = (4, 24, 24) if variant == "sala" else (8, 16, 16)
        assert mark.shape == (shape if config.is_recurrent(layer) else (2, len(IDS), 16))
        np.testing.assert_allclose(mark, whole[0][0].numpy(), atol=1e-5)
        np.testing.assert_allclose(pieces[0].numpy(), whole[0].numpy(), atol=1e-4)


def test_the_real_shape_is_traced_without_weights(record_property: Any) -> None:
    config = MiniCPMSALAConfig.from_dict(json.loads(RELEASED.read_text()))
    before, start = peak_rss(), time.perf_counter()
    graph = trace.trace(minicpm_sala.Model, config, config.rope.table(config.max_context)).graph
    seconds, after = time.perf_counter() - start, peak_rss()
    ops = Counter(node.op_type for node in graph if node.domain == "cpm")
    assert ops == {"SparseAttention": 8, "LinearAttention": 24}
    weights = [value for value in graph.initializers.values() if value.const_value is None]
    parameters = sum(int(np.prod(value.shape.numpy())) for value in weights if value.shape is not None)
    assert parameters == pytest.approx(9.48e9, rel=0.01)
    record_property("seconds", seconds)
    if before and after:
        record_property("rss_bytes", after)
        assert after - before < 1 << 30
