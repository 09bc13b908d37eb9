"""Bytes of caches, against what sessions hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cpm_edge.benchmarks.plan import PlanError
from cpm_edge.benchmarks.plan.cache import cache_bytes, cache_format, read_bytes
from cpm_edge.benchmarks.plan.shape import ModelShape, Sparse
from cpm_edge.benchmarks.token_bytes import cache_bytes as read_by_the_kernel
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from cpm_edge.runtimes import open_engine
from tests.source_tree import ROOT
from tests.support.bundles import NATIVE

if TYPE_CHECKING:
    from tests.support.bundles import Bundles

CONTEXT = 200
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "ort", {}),
    ("llama", "aipc", {"weight_format": "int8", "kv_cache": "fp16"}),
    ("sparse", "aipc", NATIVE),
    ("sparse", "aipc", {**NATIVE, "kv_cache": "int8"}),
    ("minicpm3", "ort", {}),
    ("sala", "aipc", NATIVE),
]


@pytest.mark.parametrize(
    ("variant", "target", "options"), CASES, ids=[f"{v}-{t}-{len(o)}" for v, t, o in CASES]
)
def test_a_full_session_holds_the_predicted_bytes(
    bundles: Bundles, variant: str, target: str, options: dict[str, Any]
) -> None:
    bundle = bundles.open(variant, target, **options)
    shape = ModelShape.read(json.loads(bundle.file("config.json").read_text()))
    flavour = options.get("flavour", "stock")
    weights = options.get("weight_format", "fp32")
    form = cache_format(shape, target, flavour, options.get("kv_cache"), weights)
    expected = cache_bytes(shape, CONTEXT, target, flavour, form)
    multiple = bundle.manifest.cache.get("multiple_of", 1)  # whole blocks, of 16 in tiny models
    with open_engine(bundle, device="CPU", threads=1, max_context=CONTEXT).session() as session:
        session.forward(np.arange(2, 2 + CONTEXT) % 50)
        kept = session._snapshots.nbytes if session._snapshots else 0
        rows = -(-CONTEXT // multiple) * multiple
        whole = cache_bytes(shape, rows, target, flavour, form) if multiple < 64 else expected
        growing = (whole.rows + whole.pooled) * rows // whole.capacity
        assert session.cache_bytes() - kept == growing + whole.states


def test_published_sizes() -> None:
    """32 KiB a token for MiniCPM4-8B, 34.9 KiB of latents for MiniCPM3-4B, both in float16."""
    for name, size in (("minicpm4-8b", 32 * 1024), ("minicpm3-4b", 62 * 288 * 2)):
        shape = ModelShape.read(ROOT / f"tests/data/configs/{name}.json")
        assert cache_bytes(shape, 64, "aipc", "native", "fp16").rows == 64 * size


@pytest.mark.parametrize("position", [5, 8191, 8192, 40000, 131071])
def test_a_sparse_step_reads_what_the_kernel_reads(position: int) -> None:
    shape = ModelShape.read(ROOT / "tests/data/configs/minicpm4.1-8b.json").with_attention("sparse")
    spec = SparseAttentionSpec(shape.heads, shape.kv_heads, 0.1, **vars(Sparse()))
    expected = shape.layers * read_by_the_kernel(spec, shape.head_dim, position)
    assert read_bytes(shape, position, "fp16", "aipc") == expected


def test_states_are_read_and_written_at_any_position() -> None:
    shape = ModelShape.read(ROOT / "tests/data/configs/minicpm-sala.json").with_attention("sparse")
    states = 2 * 4 * 24 * 32 * 128 * 128
    first, last = (read_bytes(shape, position, "fp16", "aipc") for position in (100, 500_000))
    assert states < first < last < 10 * states


@pytest.mark.parametrize(
    ("config", "target", "flavour", "asked", "message"),
    [
        ("minicpm4-8b", "ort", "", "fp16", "expected fp32 for ort, got fp16"),
        ("minicpm3-4b", "aipc", "native", "int8", "expected fp16 for aipc native, got int8"),
        ("minicpm3-4b", "aipc", "stock", "fp16", "expected fp32 for aipc stock, got fp16"),
    ],
)
def test_formats_that_a_target_does_not_have(
    config: str, target: str, flavour: str, asked: str, message: str
) -> None:
    shape = ModelShape.read(ROOT / f"tests/data/configs/{config}.json")
    with pytest.raises(PlanError, match=message):
        cache_format(shape, target, flavour, asked, "int4")
