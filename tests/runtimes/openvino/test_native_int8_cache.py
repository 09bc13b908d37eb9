"""Native bundles exported with ``--kv-cache int8``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpm_edge.exporter.ops import sparse_attention as ops
from cpm_edge.plugins.sparse_attention.cache import KEY_GROUP, dequantize, quantize
from cpm_edge.runtimes.openvino.native_session import OpenVinoNativeSession
from cpm_edge.runtimes.session import Session
from tests.runtimes.openvino.test_native import emulated
from tests.support.bundles import NATIVE, Bundles

INT8 = NATIVE | {"kv_cache": "int8"}


def native_session(bundles: Bundles, variant: str) -> OpenVinoNativeSession:
    session = bundles.engine(variant, "aipc", **INT8).session()
    assert isinstance(session, OpenVinoNativeSession)
    return session


def stored(rows: torch.Tensor, kv_heads: int, group: int | None = None) -> torch.Tensor:
    """Rows (B, T, kv heads * D) as an int8 cache keeps them, with a scale every ``group`` columns."""
    heads = rows.numpy().reshape(*rows.shape[:2], kv_heads, -1)
    group = group or heads.shape[-1]
    return torch.from_numpy(dequantize(*quantize(heads, group), group)).view(rows.shape)


@pytest.mark.parametrize("variant", ["llama", "tied-mha", "sparse", "sparse-group3"])
def test_logits_are_those_of_the_modules_with_the_same_roundings(
    bundles: Bundles, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ops.sparse_attention

    def rounding(query: Any, key: Any, value: Any, *caches: Any, spec: Any) -> Any:
        key, value = stored(key, spec.kv_num_heads, KEY_GROUP), stored(value, spec.kv_num_heads)
        return original(query, key, value, *caches, spec=spec)

    tokens = bundles.prompt
    with monkeypatch.context() as patch:
        patch.setattr("cpm_edge.exporter.models.llama.sparse_attention", rounding)
        (expected,) = emulated(bundles, variant, tokens[None], patch, cache_type=torch.float32)
    with native_session(bundles, variant) as session:
        got = session.forward(tokens, logits="all")
    error = np.abs(got - expected).max(1) / expected.std()
    # As with float16 caches: exact until a float on a rounding boundary gets another code.
    assert np.percentile(error, 5) < 1e-4, np.percentile(error, [5, 50, 90, 100])
    assert np.median(error) < 0.1, np.percentile(error, [5, 50, 90, 100])
    cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(cosine) > 0.999


@pytest.mark.parametrize("variant", ["llama", "sparse"])
def test_the_cache_takes_half_the_bytes(bundles: Bundles, variant: str) -> None:
    layout = bundles.open(variant, "aipc", **INT8).manifest.cache
    info = bundles.engine(variant, "aipc", **INT8).info()
    assert (layout["dtype"], layout["key_group"], info["kv_cache"]) == ("int8", KEY_GROUP, "int8")
    size = layout["head_dim"]
    assert size in (16, 32)
    with native_session(bundles, variant) as session:
        rows = session.capacity * layout["layers"] * layout["kv_heads"]
        # A code a column, and one scale each for a key of up to 32 columns and a value.
        assert session.cache_bytes() - session.pooled_bytes() == rows * 2 * (size + 2)
    with bundles.engine(variant, "aipc", **NATIVE).session() as usual:
        assert isinstance(usual, OpenVinoNativeSession)
        assert usual.cache_bytes() - usual.pooled_bytes() == rows * 2 * size * 2
        assert "key_group" not in bundles.open(variant, "aipc", **NATIVE).manifest.cache


def test_growth_rewind_and_fork(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpm_edge.runtimes.openvino.native_session.FIRST_CAPACITY", 64)
    tokens = bundles.prompt
    with native_session(bundles, "sparse") as session:
        whole = session.forward(tokens[:200])
        keys = session.layer_keys(1).copy()
        following = session.forward(tokens[200:201])
        session.rewind(101)
        session.forward(tokens[100:200])
        twin = session.fork()
        np.testing.assert_allclose(session.forward(tokens[200:201]), following, atol=0.1 * whole.std())
        agree(twin, session, tokens)
        twin.close()
        assert session.layer_keys(1).shape[1] > 200
        np.testing.assert_allclose(session.layer_keys(1)[:, :100], keys[:, :100], rtol=0, atol=0)


def agree(twin: Session, session: Session, tokens: Any) -> None:
    """A fork one token behind catches up and then goes the same way, also where its cache must grow."""
    twin.forward(tokens[200:201])
    for token in tokens[201:]:
        np.testing.assert_array_equal(twin.forward([token]), session.forward([token]))


def test_a_filled_cache_is_that_of_a_prefill(bundles: Bundles) -> None:
    tokens = bundles.prompt
    with native_session(bundles, "sparse") as source, native_session(bundles, "sparse") as target:
        source.forward(tokens[:300])
        reads = (source.layer_keys, source.layer_values)
        for first, stop in ((0, 7), (7, 130), (130, 131), (131, 300)):
            rows = slice(first, stop)
            keys, values = ([read(layer)[:, rows] for layer in range(2)] for read in reads)
            target.fill(tokens[rows], list(zip(keys, values, strict=True)).__getitem__)
        for layer in range(2):
            # What was rounded once is rounded to itself.
            np.testing.assert_array_equal(target.layer_keys(layer), source.layer_keys(layer))
            np.testing.assert_array_equal(target.layer_values(layer), source.layer_values(layer))
        expected = source.forward(tokens[300:])
        np.testing.assert_allclose(target.forward(tokens[300:]), expected, atol=1e-4 * expected.std())
