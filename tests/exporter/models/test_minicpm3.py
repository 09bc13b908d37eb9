"""MiniCPM3's modules: chunks, transformers' own implementation, and a trace at the real shape."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpm_edge.exporter import eager, trace
from cpm_edge.exporter.configs import MiniCPM3Config
from cpm_edge.exporter.models import minicpm3
from cpm_edge.runtimes.stats import peak_rss
from tests.support.checkpoints import VARIANTS, make_tensors, prompt

RELEASED = Path(__file__).parents[2] / "data/configs/minicpm3-4b.json"
IDS = prompt(300)  # longer than the 256 tokens of the short LongRoPE list


def streamed(variant: str) -> eager.EagerRun:
    config = MiniCPM3Config.from_dict(VARIANTS[variant])
    table = config.rope.table(config.max_context)
    weights = make_tensors(VARIANTS[variant]) | {"rotary.inv_freq": table.inv_freq}
    return eager.run_streamed(minicpm3.Model, config, table, weights.__getitem__, IDS.tolist())


@torch.no_grad()
def test_chunks_and_steps_are_the_whole_prompt() -> None:
    config = MiniCPM3Config.from_dict(VARIANTS["minicpm3"])
    table = config.rope.table(config.max_context)
    weights = make_tensors(VARIANTS["minicpm3"]) | {"rotary.inv_freq": table.inv_freq}
    model: Any = eager.build_model(minicpm3.Model, config, table)
    eager.load_weights(model, "", weights.__getitem__, tied=True)
    ids, past = torch.from_numpy(IDS)[None], torch.zeros(1, dtype=torch.int64)
    caches, rows = eager.empty_caches(config, len(IDS)), []
    for start, stop in ((0, 1), (1, 34), (34, 299), (299, 300)):
        logits, caches = model(ids[:, start:stop], past + start, caches)
        rows.append(logits)
    whole = streamed("minicpm3")
    np.testing.assert_allclose(torch.cat(rows, 1)[0].numpy(), whole.logits, atol=2e-4)
    for expected, (key,) in zip(whole.keys, caches, strict=True):
        assert expected.shape == (1, len(IDS), 48 + 8)
        np.testing.assert_allclose(key[0].numpy(), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["minicpm3", "minicpm3-untied"])
def test_transformers_computes_the_same(variant: str) -> None:
    """An implementation that is not ours, and that expands the latents."""
    expected = transformers_logits(VARIANTS[variant])
    assert np.abs(streamed(variant).logits - expected).max() <= 5e-4


def transformers_logits(raw: dict[str, Any]) -> npt.NDArray[np.float32]:
    from transformers import MiniCPM3Config as TheirConfig
    from transformers import MiniCPM3ForCausalLM

    settings = json.loads(json.dumps({key: value for key, value in raw.items() if key != "architectures"}))
    model: Any = MiniCPM3ForCausalLM(TheirConfig(**settings))
    model.eval()
    weights = {name: torch.from_numpy(array) for name, array in make_tensors(raw).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if raw["tie_word_embeddings"] else [])
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return logits


def test_the_real_shape_is_traced_without_weights(record_property: Any) -> None:
    config = MiniCPM3Config.from_dict(json.loads(RELEASED.read_text()))
    before, start = peak_rss(), time.perf_counter()
    graph = trace.trace(minicpm3.Model, config, config.rope.table(config.max_context)).graph
    seconds, after = time.perf_counter() - start, peak_rss()
    nodes = [node for node in graph if node.domain == "cpm"]
    assert Counter(node.op_type for node in nodes) == {"SparseAttention": 62}
    assert [value.name if value is not None else None for value in nodes[3].inputs[2:]] == [
        None,
        "past_key_values.3.key",
        None,
        "past_length",
    ]
    shapes = {value.name: list(map(str, value.shape or ())) for value in (*graph.inputs, *graph.outputs)}
    assert shapes["past_key_values.61.key"] == shapes["present.61.key"] == ["batch", "1", "capacity", "288"]
    weights = [value for value in graph.initializers.values() if value.const_value is None]
    parameters = sum(int(np.prod(value.shape.numpy())) for value in weights if value.shape is not None)
    assert parameters == pytest.approx(4.07e9, rel=0.01)
    record_property("seconds", seconds)
    if before and after:
        record_property("rss_bytes", after)
        assert after - before < 1 << 30
